"""The formats: which elements share a scale, what its tensor is called, and how a config says so.

Sources:
    compressed-tensors: vllm-project/compressed-tensors 0.20.0, quantization/lifecycle/initialize.py
        `initialize_qparams` (shape `(1,)` of a tensor's scale, `(rows, 1)` of its channels'), quantization/
        quant_config.py `QuantizationConfig`, compressors/naive_quantized `FloatQuantizationCompressor`;
        vllm-project/vllm 00cb05c, model_executor/layers/quantization/compressed_tensors/schemes/
        compressed_tensors_w8a8_fp8.py `CompressedTensorsW8A8Fp8` (float32 parameters). transformers 5.23 rounds stored
        scales to the model's dtype unless it dequantises while loading: exact for bfloat16 numbers.
    fine-grained: huggingface/transformers 5.23, integrations/finegrained_fp8.py `FP8Linear` (float32
        `weight_scale_inv`, partial blocks counted) and utils/quantization_config.py `FineGrainedFP8Config`;
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.errors import ConfigError
from converters.quantized.e4m3 import Block, scale_shape

KEPT = ("lm_head",)
"""The linear layers outside the decoder layers."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One format.

    Attributes:
        name: On the command line.
        suffix: Of the scale's key, after that of the weight.
        block: What shares a scale.
    """

    name: str
    suffix: str
    block: Block

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scale tensor of a weight."""
        return (1,) if self.block == (None, None) else scale_shape(shape, self.block)

    def partial(self, shape: tuple[int, ...]) -> bool:
        """Whether blocks reach over the edge of a weight."""
        return any(extent and size % extent for extent, size in zip(self.block, shape, strict=True))

    def config(self) -> dict[str, Any]:
        """The `quantization_config` of a folder in this format."""
        if self.suffix == "_scale_inv":
            return {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": list(self.block),
                "modules_to_not_convert": list(KEPT),
            }
        numbers = {"num_bits": 8, "type": "float", "symmetric": True}
        strategy = "tensor" if self.block == (None, None) else "channel"
        group = {
            "targets": ["Linear"],
            "weights": {**numbers, "strategy": strategy, "dynamic": False},
            "input_activations": {**numbers, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(KEPT),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="compressed-tensors", suffix="_scale", block=(None, None)),
        Scheme(name="compressed-tensors-channel", suffix="_scale", block=(1, None)),
        Scheme(name="fine-grained", suffix="_scale_inv", block=(128, 128)),
    )
}


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What a config says about its folder: the format, and the modules that are not in it."""

    scheme: Scheme
    kept: tuple[str, ...]

    def keeps(self, module: str) -> bool:
        """Whether a linear layer is declared to be in full precision.

        Source: huggingface/transformers 5.23, quantizers/quantizers_utils.py `should_convert_module`;
            vllm-project/compressed-tensors 0.20.0, utils/match.py `match_name`.
        """
        if self.scheme.suffix == "_scale_inv":
            return any(module == name or module.startswith(name + ".") or module.endswith(name) for name in self.kept)
        return any(
            re.match(name.removeprefix("re:"), module) is not None if name.startswith("re:") else module == name
            for name in self.kept
        )


def declared(config: Mapping[str, Any]) -> Declared:
    """The format that a `config.json` declares.

    Raises:
        ConfigError: None, or one that is not read here; every reason.
    """
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        raise ConfigError(f"quantization_config={found!r}, expected that of an FP8 checkpoint: nothing to dequantise")
    method = found.get("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors(found)
    if method == "fp8":
        return _fine_grained(found)
    raise ConfigError(f"quant_method={method!r}, expected 'compressed-tensors' or 'fp8'")


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n".join(["quantization_config: cannot be read here:", *(f"  {line}" for line in problems)]))


def _expected(found: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], where: str = "") -> list[str]:
    return [
        f"{where}{name}={found.get(name)!r}, expected {' or '.join(map(repr, values))}"
        for name, values in allowed.items()
        if found.get(name) not in values
    ]


def _compressed_tensors(found: Mapping[str, Any]) -> Declared:
    problems = _expected(
        found,
        {
            "format": ("float-quantized", "naive-quantized"),
            "kv_cache_scheme": (None, {}),
            "quantization_status": ("compressed", "frozen", None),
        },
    )
    groups = found.get("config_groups")
    _refuse(problems)
    if not isinstance(groups, Mapping) or len(groups) != 1 or not isinstance(next(iter(groups.values())), Mapping):
        raise ConfigError(f"quantization_config: config_groups={groups!r}, expected one group for all linear layers")
    ((name, group),) = groups.items()
    weights = group.get("weights") or {}
    problems += _expected(
        weights,
        {"num_bits": (8,), "type": ("float",), "strategy": ("tensor", "channel"), "symmetric": (True, None)},
        f"{name}.weights.",
    )
    problems += _expected(group, {"targets": (["Linear"],), "output_activations": (None,)}, f"{name}.")
    _refuse(problems)
    by_strategy = {"tensor": "compressed-tensors", "channel": "compressed-tensors-channel"}
    return Declared(scheme=SCHEMES[by_strategy[weights["strategy"]]], kept=tuple(found.get("ignore") or ()))


def _fine_grained(found: Mapping[str, Any]) -> Declared:
    size = found.get("weight_block_size")
    if not (isinstance(size, list) and len(size) == 2 and all(type(extent) is int and extent > 0 for extent in size)):
        raise ConfigError(f"quantization_config: weight_block_size={size!r}, expected two positive whole numbers")
    _refuse(
        _expected(
            found, {"fmt": ("e4m3", None), "scale_fmt": ("float", "ue8m0", None), "modules_to_convert": (None, [])}
        )
    )
    kept = found.get("modules_to_not_convert")
    scheme = Scheme(name="fine-grained", suffix="_scale_inv", block=(size[0], size[1]))
    return Declared(scheme=scheme, kept=KEPT if kept is None else tuple(kept))
