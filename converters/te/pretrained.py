"""What the NVLlama models have in common: how parameters start, and what of them is saved.

`_extra_state` (scales and amax histories of delayed scaling) is left out of `state_dict()` and so of
`save_pretrained`, as in the recipe, and has a file of its own:

    model.save_pretrained(folder)
    model.save_extra_states(folder)                      # te_extra_state.safetensors: bytes by key
    model = NVLlamaForCausalLM.from_pretrained(folder, fp8_recipe=recipe)
    model.load_extra_states(folder)

Source: NVIDIA/bionemo-framework, bionemo-recipes/models/llama3/modeling_llama_te.py, NVLlamaPreTrainedModel.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from converters.errors import CheckpointError, ConfigError, TopologyError, listing
from converters.te.config import NVLlamaConfig
from converters.te.layers import Layers, layers_for

EXTRA_STATE = "_extra_state"
EXTRA_STATES_FILE = "te_extra_state.safetensors"


class NVLlamaPreTrainedModel(PreTrainedModel):
    """What the NVLlama models have in common."""

    config_class = NVLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerLayer"]  # noqa: RUF012  # an instance variable there
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012  # an instance variable there
    # Older files of the recipe have the frequencies of the rotary embedding, which follow from the config.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"\._extra_state$"]  # noqa: RUF012  # an instance variable there

    def _init_weights(self, module: nn.Module) -> None:
        """Start the parameters that neither a layer's own `init_method` nor a checkpoint has set."""
        if not _is_layer(module):
            super()._init_weights(module)  # type: ignore[no-untyped-call]
            return
        for name, parameter in module.named_parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                _start(module, name, parameter, self.config.initializer_range)

    def init_empty_weights(self) -> None:
        """Give a model that was built on the meta device its memory and first values, on the layers' device."""
        for module in self.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                if _is_layer(module) and callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
                else:
                    module.to_empty(device=_device_of(layers_for(None)), recurse=False)
                    self._init_weights(module)
        self.tie_weights()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, of a checkpoint in the layout of Transformer Engine.

        Raises:
            CheckpointError: The checkpoint is Hugging Face's: none of its layers' weights would be used.
        """
        asked = kwargs.pop("output_loading_info", False)
        parent: Any = super()  # typed there without what output_loading_info adds
        folder = pretrained_model_name_or_path
        model, told = parent.from_pretrained(folder, *args, output_loading_info=True, **kwargs)
        if theirs := [key for key in told["unexpected_keys"] if ".self_attn." in key]:
            raise CheckpointError(
                f"{folder} has Hugging Face's weights ({min(theirs)}, ...), and this model takes Transformer Engine's. "
                f"Convert them, python -m converters convert --from hf --to te {folder} TARGET, or load them with "
                "converters.te.convert.load"
            )
        return (model, told) if asked else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As in transformers; one rank has to hold the whole model.

        Raises:
            TopologyError: The model is cut over ranks.
        """
        self._check_whole("save_pretrained")
        return super().save_pretrained(save_directory, *args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the head is a layer of fixed size, and padded over ranks.

        Raises:
            ConfigError: Always; nothing is changed.
        """
        raise ConfigError(
            "resize_token_embeddings: Transformer Engine's layers keep their sizes. Convert to Hugging Face "
            "(convert_llama_te_to_hf), resize that model, and convert it back (convert_llama_hf_to_te)"
        )

    def _check_whole(self, what: str) -> None:
        decoder: Any = self.base_model
        size = decoder.parallel.tp_size
        if size > 1:
            raise TopologyError(
                f"{what}: the model is cut over tp={size} ranks, and each would write its own part to the same file. "
                "converters.te.convert.save writes the weights of all of them as one checkpoint"
            )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, without `_extra_state`: see `extra_states` for it."""
        whole = super().state_dict(*args, **kwargs)
        for key in [key for key in whole if key.endswith("_extra_state")]:
            del whole[key]
        return whole

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As torch's; an `_extra_state` may be missing, since `state_dict` leaves it out."""
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [key for key in found.missing_keys if not key.endswith("_extra_state")]
        tied = getattr(self, "all_tied_weights_keys", None) or {}
        missing = [key for key in missing if tied.get(key) not in state_dict]
        if strict and (missing or found.unexpected_keys):
            raise RuntimeError(
                f"Error(s) in loading state_dict for {type(self).__name__}: Missing key(s): {missing}. "
                f"Unexpected key(s): {found.unexpected_keys}."
            )
        return type(found)(missing, found.unexpected_keys)

    def extra_states(self) -> dict[str, Tensor]:
        """What layers keep beside their weights, by key: scales and amax histories of delayed scaling.

        Returns:
            For each `..._extra_state` key that holds anything, its bytes, `[n]` uint8 on the CPU.
        """
        held = {name: module.get_extra_state() for name, module in self.named_modules() if _has_extra_state(module)}
        return {
            f"{name}.{EXTRA_STATE}": state.detach().cpu().clone()
            for name, state in held.items()
            if isinstance(state, Tensor) and state.numel()
        }

    def save_extra_states(self, folder: str | Path) -> Path:
        """Write `extra_states()` to `te_extra_state.safetensors` in `folder`, and return its path.

        Raises:
            TopologyError: The model is cut over ranks.
        """
        self._check_whole("save_extra_states")
        path = Path(folder) / EXTRA_STATES_FILE
        save_file(self.extra_states(), path, metadata={"format": "pt"})
        return path

    def load_extra_states(self, states: Mapping[str, Tensor] | str | Path) -> None:
        """Give layers the state that `extra_states` returned, or that `save_extra_states` wrote.

        The reference walks the bytes itself, and runs no unpickler on them. Transformer Engine's own layers unpickle
        them, and refuse to unless the environment variable NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE says they are trusted.

        Args:
            states: By key; or the folder that the file is in.

        Raises:
            CheckpointError: No file, or keys of no layer of this model.
            ConversionError: Bytes that are no state of a layer, or a stale one.
        """
        if isinstance(states, (str, Path)):
            path = Path(states) / EXTRA_STATES_FILE
            if not path.is_file():
                raise CheckpointError(f"{path}: no such file; save_extra_states(folder) writes it beside the weights")
            states = load_file(path)
        layers = {f"{name}.{EXTRA_STATE}": module for name, module in self.named_modules() if _has_extra_state(module)}
        if unknown := states.keys() - layers.keys():
            raise CheckpointError(listing("extra states of layers that this model does not have", unknown))
        for key, module in layers.items():  # one whose state is missing refuses to go on with that of other weights
            module.set_extra_state(states.get(key))


def _is_layer(module: nn.Module) -> bool:
    """Whether it is one of Transformer Engine's or of the reference's, which start their own parameters."""
    return type(module).__module__.startswith(("transformer_engine.", "converters.te.reference"))


def _start(module: nn.Module, name: str, parameter: nn.Parameter, std: float) -> None:
    is_norm = name.endswith("layer_norm_weight") or type(module).__name__ == "RMSNorm"
    with torch.no_grad():
        if is_norm:
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0.0, std)


def mark_started(model: nn.Module) -> None:
    """Layers off the meta device have started their parameters; `post_init` is not to start them again."""
    for module in model.modules():
        if _is_layer(module):
            for parameter in module.parameters(recurse=False):
                if not parameter.is_meta:
                    parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def normal(config: NVLlamaConfig) -> Any:
    """What starts the weights of GEMMs."""
    std = config.initializer_range

    def start(weight: Tensor) -> None:
        nn.init.normal_(weight, mean=0.0, std=std)

    return start


def dtype_of(config: NVLlamaConfig) -> torch.dtype:
    """Of parameters: the config's, else torch's default."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.get_default_dtype()


def _device_of(layers: Layers) -> torch.device:
    return torch.device("cuda" if layers.kind == "transformer_engine" else "cpu")


def place_of(layers: Layers, device: torch.device | str | None) -> torch.device:
    """Where parameters are made: on the meta device inside `torch.device("meta")`, else where the layers run."""
    if torch.get_default_device().type == "meta":
        return torch.device("meta")
    return _device_of(layers) if device is None else torch.device(device)


def _has_extra_state(module: nn.Module) -> bool:
    """Whether its class keeps anything beside parameters and buffers."""
    return type(module).set_extra_state is not nn.Module.set_extra_state
