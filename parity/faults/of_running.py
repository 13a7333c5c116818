"""Faults of what is computed, with weights and config that are right."""

from __future__ import annotations

from parity.causes import Cause
from parity.faults.catalogue import Fault
from parity.faults.mutations import Patch, Values

FORWARD = (
    # name, source, needs, sub-modules that a diagnosis may name
    ("inv_freq in bf16", "Automodel #2549", (), ("rope", "attention")),
    # Transformer Engine's norms are part of the linear that follows, and of what it is called.
    ("eps outside the root", "MB #5712, gpt-neox #1345", (), ("norm", "attention")),
    ("eps 1e-6", "MB #5712", (), ("norm",)),
    ("scale by hidden", "Fast-LLM #102", ("own head_dim",), ("attention",)),
    ("no causal mask", "a mask that is not asked for", ("no cp",), ("mask", "attention")),
    ("one token ahead", "a mask off by one", ("no cp",), ("mask", "attention")),
    ("sliding window", "MB #4800", ("no cp",), ("mask", "attention")),
    ("mask ignored", "left padding ignored, packed sequences leaking", ("no cp",), ("mask", "attention")),
    ("softmax in bf16", "attention_softmax_in_fp32 off", ("no cp",), ("attention",)),
    ("rope interleaved", "llama.cpp #3364", (), ("rope", "attention")),
    ("no rope", "position_embedding_type", (), ("rope", "attention")),
    ("gelu", "MB #4661", (), ("mlp",)),
    ("contiguous cp positions", "TE #3331", ("cp",), ("rope", "positions", "attention")),
)
IN_BLOCKS = ("gelu", "rope interleaved")
"""Those that the check of every block's output has to see as well."""
ON_TE = (
    # as `FORWARD`, of Transformer Engine's layers alone
    ("left padding ignored", "left padding ignored", ("no cp", "no sp"), ("mask",)),
    ("packed sequences leak", "packed sequences leaking", ("no cp",), ("mask",)),
    ("padded tail uncounted", "TE #3331", ("cp",), ("mask",)),
    ("vocabulary halves exchanged", "MB #625", ("tp",), ()),
)
DECODING = (
    ("cache stale by one", "", (), ("cache",)),
    ("decode positions off by one", "", (), ("positions", "cache")),
    ("padding ignored in decode", "", (), ("mask", "cache")),
    ("beam cache not reordered", "", (), ("cache",)),
)
TRAINING = (
    ("cp loss averaged", "a mean of each rank", ("cp",), ("loss", "gradients")),
    ("default p2p", "pp 2 with vpp", ("pp", "vpp"), ("gradients",)),
    ("tied gradients not added", "MB #957", ("tied", "pp"), ("gradients",)),
    ("gradients of norms not added", "sequence parallelism without its reduction", ("sp",), ("gradients",)),
)
BOTH, TE = ("megatron", "te"), ("te",)
BACKENDS = {
    **dict.fromkeys((name for name, *_ in FORWARD), BOTH),
    **dict.fromkeys(("mask ignored", "softmax in bf16"), ("megatron",)),
    **dict.fromkeys((name for name, *_ in DECODING), BOTH),
    **dict.fromkeys(("default p2p", "tied gradients not added"), ("megatron",)),
    **dict.fromkeys(("cp loss averaged",), BOTH),
    **dict.fromkeys((*(name for name, *_ in ON_TE), "beam cache not reordered", "gradients of norms not added"), TE),
}
"""Where each is tried."""
RANKS = (
    ("a rank dies", "MB #3428"),
    ("a rank hangs", "MB #3428"),
    ("a rank raises", "MB #3428"),
)


def _causes(parts: tuple[str, ...]) -> tuple[Cause, ...]:
    return tuple(Cause(kind="computation", what=(part,)) for part in parts)


FAULTS = (
    *(
        Fault(
            name=f"running: {name}",
            family="running" if "bf16" not in name else "dtype",
            source=source,
            does=(Patch(name),),
            at=("import",),
            needs=needs,
            causes=_causes(parts) + (Cause(kind="config", what=("rms_norm_eps",)),) * (name == "eps 1e-6"),
            checks=("logits", "blocks") if name in IN_BLOCKS else ("logits",),
            backends=BACKENDS[name],
        )
        for name, source, needs, parts in (*FORWARD, *ON_TE)
    ),
    *(
        Fault(
            name=f"decoding: {name}",
            family="running",
            source=source or "the KV cache",
            does=(Patch(name),),
            at=("import",),
            needs=("no cp", "no vpp", *needs),
            causes=_causes(parts),
            checks=("decoding",),
            backends=BACKENDS[name],
        )
        for name, source, needs, parts in DECODING
    ),
    *(
        Fault(
            name=f"training: {name}",
            family="running",
            source=source,
            does=(Patch(name),),
            at=("import",),
            needs=needs,
            causes=_causes(parts),
            checks=("training",),
            backends=BACKENDS[name],
        )
        for name, source, needs, parts in TRAINING
    ),
    *(
        Fault(
            name=f"ranks: {name}",
            family="running",
            source=source,
            does=(Patch(name),),
            at=("import",),
            needs=("ranks",),
            causes=(Cause(kind="ranks"),),
            checks=("import",),
        )
        for name, source in RANKS
    ),
    Fault(
        name="equivalent: positions moved",
        family="running",
        source="RoPE knows differences of positions only",
        does=(Patch("positions moved"),),
        at=("import",),
        needs=("no cp", "no vpp"),
        equivalent="attention depends on differences of positions, which a shift of all of them leaves alone; "
        "far out, float32 angles round otherwise, which the logits of far positions do show",
        checks=("decoding",),
    ),
    Fault(
        name="equivalent: padding rows can be chosen",
        family="running",
        source="the vocabulary's padding",
        does=(Patch("padding rows chosen"),),
        at=("import",),
        needs=("no cp", "no vpp", "padding"),
        equivalent="the logit of a padding row is 0, and the best of a real vocabulary is above it",
        checks=("decoding",),
    ),
    Fault(
        name="equivalent: norms by way of float16",
        family="dtype",
        source="bf16 to float16 and back",
        does=(Values(("input_layernorm", "post_attention_layernorm"), "half"),),
        at=("import",),
        needs=("bf16",),
        equivalent="float16 holds every bfloat16 number of its range: of weights within it, no bit is lost",
        checks=("round trip", "logits"),
    ),
)
