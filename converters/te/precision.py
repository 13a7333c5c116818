"""In which precision each layer runs: the contexts that its GEMMs are built and run in."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from converters.errors import ConfigError
from converters.te.config import NVLlamaConfig
from converters.te.layers import Layers

TOKENS_MULTIPLE = 32  # what the GEMMs of every quantised recipe divide tokens by, MXFP8 being the widest


class RecipeError(ConfigError, RuntimeError):
    """Recipes that do not fit the precisions that the layers are asked for."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The precision of each layer, and the recipes of those that are quantised.

    Attributes:
        of: `"fp8"`, `"fp4"` or `None` for each layer; empty where no layer is quantised.
        recipes: By precision; `None` is the layers' own default.
        quantized_init: Whether quantised layers hold quantised weights only.
    """

    of: tuple[str | None, ...]
    recipes: dict[str | None, Any]
    quantized_init: bool

    @classmethod
    def resolve(cls, config: NVLlamaConfig, fp8_recipe: Any = None, fp4_recipe: Any = None) -> Precision:
        """What `config.layer_precision` and the recipes ask for together. The config is left as it is.

        Raises:
            RecipeError: Recipes with no layers to run in them, or FP4 layers without a recipe.

        Source: NVIDIA/bionemo-framework, bionemo-recipes/models/llama3/modeling_llama_te.py, NVLlamaModel.__init__.
        """
        asked = config.layer_precision
        if asked is None and fp8_recipe is not None and fp4_recipe is not None:
            raise RecipeError(
                "Both FP8 and FP4 recipes provided, but no layer precision provided: set config.layer_precision to "
                f"a list of {config.num_hidden_layers} of 'fp8', 'fp4' and None"
            )
        if asked is None and fp4_recipe is not None:
            raise RecipeError(
                "FP4 recipe provided but no layer_precision configured: set config.layer_precision explicitly, layers "
                "at both ends are best kept out of FP4"
            )
        if asked is None and fp8_recipe is not None:
            warnings.warn("No layer precision provided, using FP8 recipe for all layers.", UserWarning, stacklevel=4)
            asked = ["fp8"] * config.num_hidden_layers
        of = tuple(asked or ())
        if "fp4" in of and fp4_recipe is None:
            raise RecipeError("layer_precision contains 'fp4' entries but no fp4_recipe was provided.")
        if "fp8" in of and fp8_recipe is None:
            warnings.warn("No FP8 recipe provided, using default recipe.", UserWarning, stacklevel=4)
        return cls(
            of=of,
            recipes={"fp8": fp8_recipe, "fp4": fp4_recipe},
            quantized_init=config.use_quantized_model_init,
        )

    @property
    def quantized(self) -> bool:
        """Whether any layer is."""
        return any(self.of)

    @property
    def delayed(self) -> bool:
        """Whether any layer scales by amax histories, which a second forward of the same step would advance."""
        return any(
            recipe is None or type(recipe).__name__ == "DelayedScaling" or getattr(recipe, "delayed", bool)()
            for recipe in (self.recipes[precision] for precision in self.of if precision)
        )

    def building(self, layer: int, layers: Layers) -> AbstractContextManager[Any]:
        """The context that layer number `layer` (from 0) is constructed in."""
        if not self.quantized_init or not self.of or self.of[layer] is None:
            return nullcontext()
        return layers.quantized_model_init(enabled=True, recipe=self.recipes[self.of[layer]])

    def around(self, layers: Layers) -> AbstractContextManager[Any]:
        """The context of all layers together: on leaving it, amax histories are reduced and advanced once."""
        if "fp8" not in self.of:
            return nullcontext()
        return layers.autocast(enabled=True, recipe=self.recipes["fp8"])

    def running(self, layer: int, layers: Layers) -> AbstractContextManager[Any]:
        """The context that layer number `layer` (from 0) runs in."""
        if not self.of:
            return nullcontext()
        precision = self.of[layer]
        if precision is None:
            return layers.autocast(enabled=False)
        return layers.autocast(enabled=True, recipe=self.recipes[precision])
