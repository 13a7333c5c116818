"""What a model is compared with: the backends, their precisions, and what each cannot do; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.errors import ConfigError
from converters.topology import Topology

QUANTISED: Mapping[str, tuple[int, int]] = {
    "fp8-delayed": (16, 8),
    "fp8-current": (16, 8),
    "fp8-block": (16, 8),
    "mxfp8": (32, 32),
    "nvfp4": (16, 16),
}
"""Precisions of matrix products below bfloat16: of what the sizes of a linear layer, and how many tokens enter it, must
be multiples.

Source: NVIDIA/TransformerEngine v2.20.2, transformer_engine/pytorch: utils.py `assert_dim_for_fp8_exec`;
    tensor/mxfp8_tensor.py and tensor/nvfp4_tensor.py, `get_scale_shape` and `is_quantizable`.
"""
PRECISIONS: tuple[str, ...] = ("fp32", "bf16", *QUANTISED)
TOKENS = 32
"""A multiple that suits every recipe."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One backend, as far as it is known before anything heavy is imported.

    Args:
        name: On the command line, and in ids.
        title: For people.
        refusals: Why it cannot run a config in a layout and precision; empty where it can.
        groups: Key-value groups, those of zeros included, with which it cuts so many groups of so many heads.
        without_cache: Why it cannot decode in a layout and precision; empty where it can.
        beams: Whether it searches with beams, which reorders its cache.
    """

    name: str
    title: str
    refusals: Callable[[Mapping[str, Any], Topology, str], list[str]]
    groups: Callable[[Topology, int, int], int]
    without_cache: Callable[[Topology, str], list[str]]
    beams: bool = False

    def ghosts(self, config: Mapping[str, Any], topology: Topology) -> int:
        """Key-value groups of zeros that it takes for the heads of a model of equal layers to divide."""
        heads = whole(config, "num_attention_heads")
        groups = config.get("num_key_value_heads") or heads
        return 0 if _blocks(config) else self.groups(topology, groups, heads // groups) - groups


def below_bf16(precision: str) -> bool:
    """Whether matrix products are quantised; weights and activations are bfloat16 then."""
    return precision in QUANTISED


def held_in(precision: str) -> str:
    """The precision of the parameters: `fp32` or `bf16`."""
    return "bf16" if below_bf16(precision) else precision


def _of_megatron(config: Mapping[str, Any], topology: Topology, precision: str) -> list[str]:
    reasons = refusals(config, topology)
    if below_bf16(precision):
        reasons.append(f"{precision} is a recipe of Transformer Engine's layers: add --backend te")
    return reasons


def _of_te(config: Mapping[str, Any], topology: Topology, precision: str) -> list[str]:
    """Why a model on Transformer Engine's layers cannot be cut over `topology`, or its products quantised."""
    if _blocks(config) or config.get("num_local_experts"):
        return ["the model on Transformer Engine's layers is a Llama whose layers are all alike, without experts"]
    reasons = []
    if topology.pp * topology.vpp > 1:
        reasons.append("Transformer Engine's layers have no pipeline: pp and vpp are Megatron-Core's")
    if topology.dp > 1:
        reasons.append("Transformer Engine's layers know nothing of data parallelism, which is torch's own (DDP, FSDP)")
    sizes = _linear_sizes(config, topology)
    width = whole(config, "intermediate_size")
    if width % topology.tp:
        reasons.append(f"a feed-forward width of {width} does not divide over tp={topology.tp}")
    elif below_bf16(precision):
        multiple = QUANTISED[precision][0]
        odd = [f"{name} {size}" for name, size in sizes.items() if size % multiple]
        if odd:
            reasons.append(
                f"{precision} takes sizes of linear layers that are multiples of {multiple}: {', '.join(odd)}"
            )
    return reasons


def _linear_sizes(config: Mapping[str, Any], topology: Topology) -> dict[str, int]:
    """Every size of a rank's linear layers."""
    tp, heads, hidden = topology.tp, whole(config, "num_attention_heads"), whole(config, "hidden_size")
    groups = config.get("num_key_value_heads") or heads
    held, head_dim = topology.whole_query_groups(groups) // tp, config.get("head_dim") or hidden // heads
    return {
        "hidden": hidden,
        "query, key and value": held * (heads // groups + 2) * head_dim,
        "heads": held * (heads // groups) * head_dim,
        "feed-forward": whole(config, "intermediate_size") // tp,
    }


def _megatron_without_cache(topology: Topology, precision: str) -> list[str]:
    """Why Megatron-Core cannot decode in this layout.

    Source: NVIDIA/Megatron-LM core_v0.16.1 (the same in core_v0.19.2): megatron/core/inference/
        model_inference_wrappers/abstract_model_inference_wrapper.py `AbstractModelInferenceWrapper.__init__` and
        transformer/attention.py `Attention._adjust_key_value_for_inference`, which cuts nothing over cp.
    """
    reasons = []
    if topology.vpp > 1:
        reasons.append("Megatron-Core's inference has no interleaved stages (vpp)")
    if topology.cp > 1:
        reasons.append("Megatron-Core's KV cache holds whole sequences, which context parallelism (cp) cuts")
    return reasons


def _te_without_cache(topology: Topology, precision: str) -> list[str]:
    """Why Transformer Engine cannot decode in this layout.

    Source: NVIDIA/TransformerEngine v2.20.2, transformer_engine/pytorch/attention/dot_product_attention/utils.py
        `get_attention_backend`: no backend is left for a KV cache under context parallelism.
    """
    reasons = []
    if topology.cp > 1:
        reasons.append("Transformer Engine's KV cache holds whole sequences, which context parallelism (cp) cuts")
    if topology.sp:
        reasons.append("sequence parallelism cuts what one step of decoding has one token of")
    return reasons


BACKENDS: Mapping[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            name="megatron",
            title="Megatron-Core",
            refusals=_of_megatron,
            groups=lambda topology, groups, heads: topology.query_groups(groups, heads),
            without_cache=_megatron_without_cache,
        ),
        Backend(
            name="te",
            title="Transformer Engine",
            refusals=_of_te,
            groups=lambda topology, groups, heads: topology.whole_query_groups(groups),
            without_cache=_te_without_cache,
            beams=True,
        ),
    )
}


def refusals(config: Mapping[str, Any], topology: Topology) -> list[str]:
    """Why Megatron-Core cannot cut this model over `topology`; empty when it can. Layer placement is not looked at.

    Args:
        config: The HF config. Layers that differ (`block_configs`) are looked at one by one.
        topology: The layout asked for.

    Raises:
        ConfigError: A field is missing.

    Source: NVIDIA/Megatron-LM core_v0.16.1 (the same in core_v0.19.2): megatron/core/transformer/transformer_config.py
        `TransformerConfig.__post_init__` (heads and groups), attention.py `Attention.__init__` (groups fewer than tp),
        moe/moe_layer.py `MoELayer.forward` (experts under tp), tensor_parallel/layers.py (`divide` of every cut axis).
    """
    tp = topology.tp
    heads, hidden = whole(config, "num_attention_heads"), whole(config, "hidden_size")
    head_dim = config.get("head_dim") or hidden // heads
    reasons: list[str] = []
    for groups in _distinct(_groups(config, heads)):
        held = topology.query_groups(groups, heads // groups)
        rows = held * (heads // groups + 2) * head_dim
        if held != groups and _blocks(config):
            reasons.append(f"{heads} heads in {groups} key-value groups do not divide over tp={tp}")
        elif rows % tp:
            reasons.append(f"the {rows} rows of the fused query-key-value matrix do not divide over tp={tp}")
    for width in _distinct(_widths(config, hidden)):
        if width % tp:
            reasons.append(f"a feed-forward width of {width} does not divide over tp={tp}")
    replaced = [block[part].get("replace_with_linear") for block in _blocks(config) for part in ("attention", "ffn")]
    if any(replaced) and hidden % tp:
        reasons.append(f"the {hidden} rows of a linear replacement do not divide over tp={tp}")
    if config.get("num_local_experts") and tp > 1 and not topology.sp:
        reasons.append(f"experts under tp={tp} cannot be trained without sequence parallelism: add --sp on")
    return reasons


def _groups(config: Mapping[str, Any], heads: int) -> Iterator[int]:
    """Key-value groups of every layer that has attention.

    Source: NVIDIA/Megatron-LM core_v0.16.1, megatron/core/transformer/heterogeneous/heterogeneous_config.py
        `AttentionConfig.build_config_from_dict`.
    """
    if not _blocks(config):
        yield config.get("num_key_value_heads") or heads
        return
    for block in _blocks(config):
        if block["attention"].get("n_heads_in_group"):
            yield heads // block["attention"]["n_heads_in_group"]


def _widths(config: Mapping[str, Any], hidden: int) -> Iterator[int]:
    """Feed-forward width of every layer that has a feed-forward part.

    Source: NVIDIA/Megatron-LM core_v0.16.1, megatron/core/transformer/heterogeneous/heterogeneous_config.py
        `MLPConfig.ffn_mult_to_intermediate_size`.
    """
    if not _blocks(config):
        yield whole(config, "intermediate_size")
        return
    for block in _blocks(config):
        if block["ffn"].get("ffn_mult"):
            yield math.ceil(int(2 * block["ffn"]["ffn_mult"] * hidden / 3) / 256) * 256


def _blocks(config: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return config.get("block_configs") or ()


def _distinct(values: Iterator[int]) -> list[int]:
    return sorted(set(values))


def whole(config: Mapping[str, Any], name: str) -> int:
    """A size in a config.

    Raises:
        ConfigError: It is missing, or no size.
    """
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"config field {name!r}: expected a whole number of at least 1, found {value!r}")
    return value
