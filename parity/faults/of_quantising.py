"""Faults of quantised products, of the state of their scales, and of checkpoints in FP8."""

from __future__ import annotations

from parity.backends import QUANTISED
from parity.faults.catalogue import Fault
from parity.faults.mutations import Patch, Quantised
from parity.faults.words import EXPORT, IMPORT, of_kind

BLOCKS = ("fp8-block", "mxfp8", "nvfp4")
PRODUCTS = (
    # name, source, precisions, what a diagnosis names
    ("quantisation off", "a recipe that is never entered", tuple(QUANTISED), "off"),
    ("one scale for all blocks", "a scale per tensor where per block", BLOCKS, "forward"),
    ("scales of blocks transposed", "mcore-bridge #32", ("fp8-block",), "forward"),
    ("scales of blocks trimmed", "mcore-bridge #32", ("fp8-block", "mxfp8"), "forward"),
    ("scales of blocks one off", "a stride of another layout", ("mxfp8", "nvfp4"), "forward"),
    ("scales of blocks all alike", "flashinfer #4093", ("fp8-block", "mxfp8"), "forward"),
    ("E5M2 where E4M3", "one format for both directions", ("fp8-current", "fp8-delayed"), "forward"),
    ("codes truncated", "a cast without rounding", ("fp8-current", "nvfp4"), "forward"),
    ("overflow to NaN", "a cast without saturation", ("fp8-delayed",), "forward"),
    ("power of two rounded down twice", "force_pow_2_scales", ("fp8-block",), "forward"),
    ("E8M0 scales rounded down", "the rounding of E8M0 scales", ("mxfp8",), "forward"),
    ("amax history stale", "TE #1623", ("fp8-delayed",), "forward"),
    ("gradients in E4M3", "Format.HYBRID", ("fp8-current",), "backward"),
    ("backward not quantised", "a backward that autograd made", ("fp8-block", "mxfp8"), "backward"),
    ("nvfp4 without stochastic rounding", "disable_stochastic_rounding", ("nvfp4",), "backward"),
    ("nvfp4 without the Hadamard transform", "disable_rht", ("nvfp4",), "backward"),
    ("head quantised", "a head inside the autocast", ("fp8-current",), "head"),
)
STATES = (
    ("state not written", "TE #1623, #1860"),
    ("state not read", "TE #1623, #1860"),
    ("missing state taken", "TE #1623, #1860"),
    ("stale state taken", "TE #1623, #1860"),
    ("state of another version taken", "TE #1623, #1860"),
)
FOLDERS = (
    # name, source, format, what a diagnosis names
    ("one scale for all blocks", "a scale per tensor where per block", "fine-grained", "scales"),
    ("one scale for all blocks", "a scale per tensor where per channel", "compressed-tensors-channel", "scales"),
    ("scales transposed", "mcore-bridge #32", "fine-grained", "scales"),
    ("scales trimmed", "mcore-bridge #32", "fine-grained", "scales"),
    ("scales of the first shard twice", "mcore-bridge #32", "fine-grained", "scales"),
    ("scales all alike", "flashinfer #4093", "fine-grained", "scales"),
    ("scales inverted", "weight_scale and its inverse", "fine-grained", "scales"),
    ("scales inverted", "weight_scale and its inverse", "compressed-tensors", "scales"),
    ("head quantised", "BioNeMo #1459", "compressed-tensors", "tensors"),
)

FAULTS = (
    *(
        Fault(
            name=f"products: {name}",
            family="quantisation",
            source=source,
            does=(Patch(name),),
            at=IMPORT,
            causes=of_kind("quantisation", part),
            checks=("products", "logits") if name == "quantisation off" else ("products",),
            backends=("te",),
            precisions=precisions,
        )
        for name, source, precisions, part in PRODUCTS
    ),
    *(
        Fault(
            name=f"state: {name}",
            family="quantisation",
            source=source,
            does=(Patch(name),),
            at=IMPORT,
            causes=of_kind("quantisation", "state"),
            checks=("state",),
            backends=("te",),
            precisions=("fp8-delayed",),
        )
        for name, source in STATES
    ),
    *(
        Fault(
            name=f"fp8 checkpoint: {name}, {scheme}",
            family="quantisation",
            source=source,
            does=(Quantised(name, scheme),),
            at=EXPORT,
            needs=("tied",),
            causes=of_kind("quantisation", part),
            checks=("checkpoints",),
            backends=("te",),
            precisions=("fp8-block",),
        )
        for name, source, scheme, part in FOLDERS
    ),
)
