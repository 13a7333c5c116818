"""The catalogue of faults that a conversion must not survive: each happened somewhere. A new fault is a new row.

In the sources, MB is NVIDIA-NeMo/Megatron-Bridge, ML NVIDIA/Megatron-LM, TE NVIDIA/TransformerEngine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from converters.topology import Topology
from parity.backends import below_bf16
from parity.causes import Cause
from parity.faults.mutations import Live, Mutation, Patch, Quantised, Resize

At = Literal["import", "export", "cancel"]
Family = Literal["layout", "missing", "files", "config", "vocabulary", "dtype", "quantisation", "running", "verifier"]
FAMILIES: tuple[Family, ...] = (
    "layout",
    "missing",
    "files",
    "config",
    "vocabulary",
    "dtype",
    "quantisation",
    "running",
    "verifier",
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One way to be wrong.

    Args:
        name: Its id; selected by glob.
        family: The section of the catalogue.
        source: Where it happened.
        does: What goes wrong, one after the other.
        at: In which direction it can be. `cancel` is the import wrong and the export wrong the same way, and needs
            mutations with an inverse.
        needs: What a model and a layout must have for it to show: names of `NEEDS`.
        causes: What a diagnosis has to say; any of them.
        checks: Checks, besides those of weights and logits, that it takes to see it.
        equivalent: Why it is no fault in the end: no check can see it, and none needs to.
        backends: On which it can be: it is tried on each.
        precisions: Of quantised matrix products: it is tried in each. None: it needs no quantised products.
    """

    name: str
    family: Family
    source: str
    does: tuple[Mutation, ...]
    at: tuple[At, ...] = ("import", "export", "cancel")
    needs: tuple[str, ...] = ()
    causes: tuple[Cause, ...] = ()
    checks: tuple[str, ...] = ()
    equivalent: str = ""
    backends: tuple[str, ...] = ("megatron",)
    precisions: tuple[str, ...] = ()

    def applies(
        self, config: Mapping[str, Any], topology: Topology, *, backend: str = "megatron", precision: str = "fp32"
    ) -> bool:
        """Whether it shows on this model in this layout, on this backend and in this precision."""
        there = precision in self.precisions if self.precisions else not below_bf16(precision)
        return backend in self.backends and there and all(NEEDS[need](config, topology) for need in self.needs)

    def must(self, at: At) -> tuple[str, ...]:
        """The checks that have to see it, each by itself: another that does is no excuse."""
        if self.checks:
            return self.checks
        if self.family == "config" or any(isinstance(mutation, Resize) and mutation.config for mutation in self.does):
            return {"import": ("config",), "export": ("export", "round trip"), "cancel": ("config",)}[at]
        # What comes back unchanged, and an export of the source itself, no round trip can see.
        return {"import": ("import",), "export": ("export",), "cancel": ("import", "export")}[at]

    @cached_property
    def runs(self) -> bool:
        """Whether it is of a process, rather than of files: it has to have a rank for itself."""
        return any(isinstance(mutation, Patch) for mutation in self.does)

    @cached_property
    def layered(self) -> bool:
        """Whether it can be in one layer alone."""
        names = [name for mutation in self.does for name in _names(mutation)]
        return bool(names) and all(name.startswith(("self_attn", "mlp", "input_", "post_")) for name in names)

    def mutations(self, at: At) -> tuple[tuple[Mutation, ...], tuple[Mutation, ...]]:
        """What it does on import, and on export."""
        back = tuple(inverse for mutation in reversed(self.does) if (inverse := mutation.inverse()) is not None)
        return {"import": (self.does, ()), "export": ((), self.does), "cancel": (self.does, back)}[at]


def _names(mutation: Mutation) -> tuple[str, ...]:
    if isinstance(mutation, Live | Patch | Quantised):
        return ()
    for field in ("names", "name"):
        found = getattr(mutation, field, None)
        if found:
            return (found,) if isinstance(found, str) else tuple(found)
    one = getattr(mutation, "one", None)
    return (one,) if isinstance(one, str) else ()


def _groups(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


NEEDS: Mapping[str, Callable[[Mapping[str, Any], Topology], bool]] = {
    "grouped": lambda config, _: 1 < _groups(config) < config["num_attention_heads"],
    "ungrouped": lambda config, _: _groups(config) == config["num_attention_heads"],
    "square": lambda config, _: _head_dim(config) * config["num_attention_heads"] == config["hidden_size"],
    "own head_dim": lambda config, _: _head_dim(config) * config["num_attention_heads"] != config["hidden_size"],
    "narrow heads": lambda config, _: _head_dim(config) * _groups(config) % (2 * config["num_attention_heads"]) == 0,
    "tied": lambda config, _: bool(config.get("tie_word_embeddings")),
    "untied": lambda config, _: not config.get("tie_word_embeddings"),
    "bias": lambda config, _: bool(config.get("attention_bias") and config.get("mlp_bias")),
    "no bias": lambda config, _: not config.get("attention_bias") and not config.get("mlp_bias"),
    "rope scaling": lambda config, _: _rope(config).get("rope_type") == "llama3",
    "padding": lambda config, topology: config["vocab_size"] % topology.tp != 0,
    "ghosts": lambda config, topology: _groups(config) % topology.tp != 0,
    "tp": lambda _, topology: topology.tp > 1,
    "pp": lambda _, topology: topology.pp > 1,
    "vpp": lambda _, topology: topology.vpp > 1,
    "no vpp": lambda _, topology: topology.vpp == 1,
    "cp": lambda _, topology: topology.cp > 1,
    "bf16": lambda config, _: config.get("torch_dtype") == "bfloat16",
    "fp32": lambda config, _: config.get("torch_dtype") != "bfloat16",
    "no cp": lambda _, topology: topology.cp == 1,
    "no sp": lambda _, topology: not topology.sp,
    "sp": lambda _, topology: topology.sp,
    "ranks": lambda _, topology: topology.world_size > 1,
}
"""What a fault may need, of the config and the layout."""

NOT_YET: tuple[tuple[str, str], ...] = (
    ("experts in another order (vime #388)", "no model with experts can be converted yet"),
    ("experts duplicated over ep ranks (MB #1716)", "no model with experts can be converted yet"),
    ("MTP layers dropped (ms-swift #6644)", "no model with multi-token prediction can be converted yet"),
    ("remote code lost (MB #3924)", "code is carried only for a trusted model, and is not compared"),
    ("an oracle with the same bug (swiss-ai Megatron-LM #85)", "the references are transformers and a statement apart"),
    ("a tolerance raised until it passes (Automodel #1839)", "no tolerance can be set"),
    ("a comparison that prints and exits 0 (MB compare.py)", "this command's own tests see to it"),
)
"""What the catalogue knows and cannot inject: and why."""


def all_faults() -> tuple[Fault, ...]:
    """The catalogue, in the order of its families."""
    from parity.faults import of_files as faults_of_files
    from parity.faults import of_layout as faults_of_layout
    from parity.faults import of_missing as faults_of_missing
    from parity.faults import of_quantising as faults_of_quantising
    from parity.faults import of_running as faults_of_running
    from parity.faults import of_values as faults_of_values
    from parity.faults.on_te import ON_TE

    modules = (
        faults_of_layout,
        faults_of_missing,
        faults_of_files,
        faults_of_values,
        faults_of_quantising,
        faults_of_running,
    )
    found = [fault for module in modules for fault in module.FAULTS]
    found = [replace(fault, backends=("megatron", "te")) if fault.name in ON_TE else fault for fault in found]
    return tuple(sorted(found, key=lambda fault: FAMILIES.index(fault.family)))
