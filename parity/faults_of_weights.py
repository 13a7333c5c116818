"""Faults of weights: in their layout, missing, doubled, of another dtype, and those that a weak verifier lets pass."""

from __future__ import annotations

from parity.causes import Cause
from parity.faults import At, Fault
from parity.mutations import (
    Broken,
    Duplicate,
    Exchange,
    Layers,
    Live,
    Presence,
    Reorder,
    Resize,
    Retype,
    Roll,
    Shards,
    SwapRows,
    Values,
)

Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")  # noqa: E741  # that is its name
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
NORM, NORM2, LAST_NORM = "input_layernorm", "post_attention_layernorm", "model.norm"
EMBED, HEAD = "model.embed_tokens", "lm_head"
LINEARS = (Q, K, V, O, GATE, UP, DOWN)
NORMS = (NORM, NORM2, LAST_NORM)
WAYS: tuple[At, ...] = ("import", "export")
IMPORT: tuple[At, ...] = ("import",)
EXPORT: tuple[At, ...] = ("export",)


def _exchanged(*names: str) -> tuple[Cause, ...]:
    return (Cause(kind="keys exchanged", what=tuple(sorted(names))),)


def _rows(*names: str) -> tuple[Cause, ...]:
    return (Cause(kind="rows permuted", what=tuple(sorted(names))),)


def _columns(*names: str) -> tuple[Cause, ...]:
    return (Cause(kind="columns permuted", what=tuple(sorted(names))),)


def _kind(kind: str, *names: str) -> tuple[Cause, ...]:
    return (Cause(kind=kind, what=tuple(sorted(names))),)


MOVED = (Cause(kind="layers moved"),)
GROUPED, CONTIGUOUS = "(group [(rep q) k v] dim)", "[(group rep q dim) (group k dim) (group v dim)]"
HALVES, PAIRS = "(head half pair)", "(head pair half)"
K_HALVES, K_PAIRS = "(group half pair)", "(group pair half)"

LAYOUT = (
    Fault(
        name="k and v exchanged",
        family="layout",
        source="two tensors of one shape",
        does=(Exchange(K, V),),
        causes=_exchanged(K, V),
    ),
    Fault(
        name="q and k exchanged",
        family="layout",
        source="two tensors of one shape, where heads are not grouped",
        does=(Exchange(Q, K),),
        needs=("ungrouped",),
        causes=_exchanged(Q, K),
    ),
    Fault(
        name="gate and up exchanged",
        family="layout",
        source="two tensors of one shape",
        does=(Exchange(GATE, UP),),
        causes=_exchanged(GATE, UP),
    ),
    Fault(
        name="biases of gate and up exchanged",
        family="layout",
        source="ML #346",
        does=(Exchange(GATE, UP, "bias"),),
        needs=("bias",),
        causes=_exchanged(f"{GATE}.bias", f"{UP}.bias"),
    ),
    Fault(
        name="qkv contiguous, read as grouped",
        family="layout",
        source="gpt-neox #1345",
        does=(Reorder((Q, K, V), "rows", written=CONTIGUOUS, read=GROUPED),),
        causes=_rows(Q, K, V),
    ),
    Fault(
        name="qkv grouped, read as contiguous",
        family="layout",
        source="Pai-Megatron-Patch #204, TE #413",
        does=(Reorder((Q, K, V), "rows", written=GROUPED, read=CONTIGUOUS),),
        causes=_rows(Q, K, V),
    ),
    Fault(
        name="qkv bias not merged like its weight",
        family="layout",
        source="ML #346",
        does=(Reorder((Q, K, V), "rows", written=CONTIGUOUS, read=GROUPED, part="bias"),),
        needs=("bias",),
        causes=_rows(f"{Q}.bias", f"{K}.bias", f"{V}.bias"),
    ),
    Fault(
        name="query heads not group by group",
        family="layout",
        source="gpt-neox #1345",
        does=(Reorder((Q,), "rows", written="(group rep dim)", read="(rep group dim)"),),
        needs=("grouped",),
        causes=_rows(Q),
    ),
    Fault(
        name="o_proj heads mapped wrongly",
        family="layout",
        source="nntile #347",
        does=(Reorder((O,), "columns", written="(group rep dim)", read="(rep group dim)"),),
        needs=("grouped",),
        causes=_columns(O),
    ),
    Fault(
        name="rope permutation missing",
        family="layout",
        source="llama.cpp #3364, torchtitan #1441",
        does=(Reorder((Q,), "rows", HALVES, PAIRS), Reorder((K,), "rows", K_HALVES, K_PAIRS)),
        causes=_rows(Q, K),
    ),
    Fault(
        name="rope permutation the other way",
        family="layout",
        source="llama.cpp #3364 (doubled)",
        does=(Reorder((Q,), "rows", PAIRS, HALVES), Reorder((K,), "rows", K_PAIRS, K_HALVES)),
        causes=_rows(Q, K),
    ),
    Fault(
        name="rope permutation of q alone",
        family="layout",
        source="maxtext #1774",
        does=(Reorder((Q,), "rows", HALVES, PAIRS),),
        causes=_rows(Q),
    ),
    Fault(
        name="rope permutation of k alone",
        family="layout",
        source="maxtext #1774",
        does=(Reorder((K,), "rows", K_HALVES, K_PAIRS),),
        causes=_rows(K),
    ),
    Fault(
        name="rope permutation of k by the heads of q",
        family="layout",
        source="llama.cpp #3364 (grouped attention)",
        does=(Reorder((K,), "rows", "(head half narrow)", "(head narrow half)"),),
        needs=("grouped", "narrow heads"),
        causes=_rows(K),
    ),
    Fault(
        name="rope permutation of weights, not of biases",
        family="layout",
        source="torchtitan #1441",
        does=(Reorder((Q,), "rows", HALVES, PAIRS, "weight"), Reorder((K,), "rows", K_HALVES, K_PAIRS, "weight")),
        needs=("bias",),
        causes=_rows(Q, K),
    ),
    Fault(
        name="fc1 cut contiguously under tp",
        family="layout",
        source="ML #360",
        does=(Reorder((GATE, UP), "rows", written="([gate up] shard part)", read="(shard [gate up] part)"),),
        needs=("tp",),
        causes=_rows(GATE, UP),
    ),
    Fault(
        name="interleaved gate and up not undone",
        family="layout",
        source="ML #7576, MB #5376",
        does=(Reorder((GATE, UP), "rows", written="([gate up] ffn)", read="(ffn [gate up])"),),
        causes=_rows(GATE, UP),
    ),
    Fault(
        name="column shards of o_proj exchanged",
        family="layout",
        source="MB #1690",
        does=(Shards((O,), "columns"),),
        needs=("tp",),
        causes=_columns(O),
    ),
    Fault(
        name="column shards of down_proj exchanged",
        family="layout",
        source="MB #1690",
        does=(Shards((DOWN,), "columns"),),
        needs=("tp",),
        causes=_columns(DOWN),
    ),
    Fault(
        name="row shards of up_proj exchanged",
        family="layout",
        source="MB #1690",
        does=(Shards((UP,), "rows"),),
        needs=("tp",),
        causes=_rows(UP),
    ),
    Fault(
        name="row shards of q_proj exchanged",
        family="layout",
        source="MB #1690",
        does=(Shards((Q,), "rows"),),
        needs=("tp",),
        causes=_rows(Q),
    ),
    Fault(
        name="square o_proj transposed",
        family="layout",
        source="slime #1840",
        does=(Reorder((O,), "elements", written="(hidden head dim)", read="(head dim hidden)"),),
        needs=("square",),
        causes=_kind("transposed", O),
    ),
    Fault(
        name="square q_proj transposed",
        family="layout",
        source="slime #1840",
        does=(Reorder((Q,), "elements", written="(head dim hidden)", read="(hidden head dim)"),),
        needs=("square",),
        causes=_kind("transposed", Q),
    ),
    Fault(
        name="down_proj transposed in memory",
        family="layout",
        source="MB #3162",
        does=(Reorder((DOWN,), "elements", written="(hidden ffn)", read="(ffn hidden)"),),
        causes=_kind("transposed", DOWN),
    ),
)

MISSING = (
    Fault(
        name="down_proj at its initial value",
        family="missing",
        source="MB #5294, #4657, ML #5844",
        does=(Values((DOWN,), "initial"),),
        at=WAYS,
        causes=_kind("initial values", DOWN),
    ),
    Fault(
        name="qkv of the live model at its initial value",
        family="missing",
        source="MB #5294",
        does=(Live(r"linear_qkv\.weight$", "initial"),),
        at=WAYS,
        causes=_kind("initial values", Q, K, V),
    ),
    Fault(
        name="k and v zero",
        family="missing",
        source="TransformerLens #1620",
        does=(Values((K, V), "zeros"),),
        at=WAYS,
        causes=_kind("zeros", K, V),
    ),
    Fault(
        name="biases zero",
        family="missing",
        source="mlc-llm #3494",
        does=(Values(LINEARS, "zeros", part="bias"),),
        at=WAYS,
        needs=("bias",),
        causes=_kind("zeros", *(f"{name}.bias" for name in LINEARS)),
    ),
    Fault(
        name="bias of v_proj zero",
        family="missing",
        source="mlc-llm #3494",
        does=(Values((V,), "zeros", part="bias"),),
        at=WAYS,
        needs=("bias",),
        causes=_kind("zeros", f"{V}.bias"),
    ),
    Fault(
        name="last shard of q_proj zero",
        family="missing",
        source="a rank that never wrote",
        does=(Values((Q,), "zeros", rows="last shard"),),
        at=WAYS,
        needs=("tp",),
        causes=_kind("zeros", Q),
    ),
    Fault(
        name="last shard of o_proj zero",
        family="missing",
        source="a rank that never wrote",
        does=(Values((O,), "zeros", columns="last shard"),),
        at=WAYS,
        needs=("tp",),
        causes=_kind("zeros", O),
    ),
    Fault(
        name="fc1 of the last tp rank zero",
        family="missing",
        source="a rank that never read",
        does=(Live(r"linear_fc1\.weight$", "zeros", "tp"),),
        at=WAYS,
        needs=("tp",),
        causes=_kind("zeros", GATE, UP),
    ),
    Fault(
        name="norms of the last tp rank at ones",
        family="missing",
        source="a replica that was not loaded",
        does=(Live(r"(input_layernorm\.weight|linear_qkv\.layer_norm_weight)$", "ones", "tp"),),
        at=IMPORT,
        needs=("tp",),
        causes=_kind("ones", NORM),
    ),
    Fault(
        name="down_proj of the last cp rank at its initial value",
        family="missing",
        source="a replica that was not loaded",
        does=(Live(r"linear_fc2\.weight$", "initial", "cp"),),
        at=IMPORT,
        needs=("cp",),
        causes=_kind("initial values", DOWN),
    ),
    *(
        Fault(
            name=f"layers from the {move} one",
            family="missing",
            source="ML #1584",
            does=(Layers(move),),
            causes=MOVED,
        )
        for move in ("next", "previous")
    ),
    Fault(
        name="two layers exchanged", family="missing", source="Primus #122", does=(Layers("exchanged"),), causes=MOVED
    ),
    Fault(
        name="layer at a stage boundary duplicated",
        family="missing",
        source="ML #1584",
        does=(Layers("boundary"),),
        at=WAYS,
        needs=("pp",),
        causes=MOVED,
    ),
    Fault(
        name="first layer twice",
        family="missing",
        source="Primus #122",
        does=(Layers("first twice"),),
        at=WAYS,
        causes=MOVED,
    ),
    Fault(
        name="stages in reverse order",
        family="missing",
        source="ML #1584",
        does=(Layers("stages"),),
        needs=("pp",),
        causes=MOVED,
    ),
    Fault(
        name="model chunks stage by stage",
        family="missing",
        source="ML #1584, Primus #122",
        does=(Layers("chunks"),),
        at=WAYS,
        needs=("vpp",),
        causes=MOVED,
    ),
    Fault(
        name="norms exchanged",
        family="missing",
        source="norms before attention and MLP",
        does=(Exchange(NORM, NORM2),),
        causes=_exchanged(NORM, NORM2),
    ),
    Fault(
        name="norms at ones",
        family="missing",
        source="a norm that nothing mapped",
        does=(Values((NORM, NORM2), "ones"),),
        at=WAYS,
        causes=_kind("ones", NORM, NORM2),
    ),
    Fault(
        name="final norm at ones",
        family="missing",
        source="a norm that nothing mapped",
        does=(Values((LAST_NORM,), "ones"),),
        at=WAYS,
        causes=_kind("ones", LAST_NORM),
    ),
    Fault(
        name="norms zero-centred",
        family="missing",
        source="layernorm_zero_centered_gamma on one side",
        does=(Values((NORM, NORM2), "minus one"), Values((LAST_NORM,), "minus one")),
        at=WAYS,
        causes=_kind("offset", *NORMS),
    ),
    Fault(
        name="v_proj a copy of k_proj",
        family="missing",
        source="a name written twice",
        does=(Duplicate(V, K),),
        at=WAYS,
        causes=(Cause(kind="duplicated", what=(V, K)),),
    ),
    Fault(
        name="up_proj a copy of gate_proj",
        family="missing",
        source="a name written twice",
        does=(Duplicate(UP, GATE),),
        at=WAYS,
        causes=(Cause(kind="duplicated", what=(UP, GATE)),),
    ),
    Fault(
        name="second norm a copy of the first",
        family="missing",
        source="a name written twice",
        does=(Duplicate(NORM2, NORM),),
        at=WAYS,
        causes=(Cause(kind="duplicated", what=(NORM2, NORM)),),
    ),
    *(
        Fault(
            name=f"tied head on the last stage {name}",
            family="missing",
            source=source,
            does=(Live(r"^output_layer\.weight$", how, "pp"),),  # type: ignore[arg-type]  # literals, below
            at=WAYS,
            needs=("tied", "pp"),
            causes=_kind(kind, HEAD) + _kind(kind, EMBED),
        )
        for name, how, kind, source in (
            ("zero", "zeros", "zeros", "MB #957, #4694"),
            ("stale", "initial", "initial values", "MB #4884"),
            ("shifted", "row below", "rows shifted", "litgpt #1727"),
        )
    ),
    Fault(
        name="head of the last stage at its initial value",
        family="missing",
        source="MB #4694",
        does=(Live(r"^output_layer\.weight$", "initial", "pp"),),
        at=WAYS,
        needs=("untied",),
        causes=_kind("initial values", HEAD),
    ),
    Fault(
        name="head a copy of the embedding",
        family="missing",
        source="litgpt #1727",
        does=(Duplicate(HEAD, EMBED),),
        at=WAYS,
        needs=("untied",),
        causes=(Cause(kind="duplicated", what=(HEAD, EMBED)),),
    ),
    Fault(
        name="embedding a copy of the head",
        family="missing",
        source="MB #957",
        does=(Duplicate(EMBED, HEAD),),
        at=WAYS,
        needs=("untied",),
        causes=(Cause(kind="duplicated", what=(EMBED, HEAD)),),
    ),
    Fault(
        name="embedding and head exchanged",
        family="missing",
        source="MB #957",
        does=(Exchange(EMBED, HEAD),),
        needs=("untied",),
        causes=_exchanged(EMBED, HEAD),
    ),
    Fault(
        name="head lost",
        family="missing",
        source="MB #4694",
        does=(Presence((HEAD,), "lost"),),
        at=WAYS,
        needs=("untied",),
        causes=_kind("missing tensors", HEAD),
    ),
    Fault(
        name="down_proj lost",
        family="missing",
        source="MB #4657",
        does=(Presence((DOWN,), "lost"),),
        at=WAYS,
        causes=_kind("missing tensors", DOWN),
    ),
    Fault(
        name="final norm lost",
        family="missing",
        source="MB #4657",
        does=(Presence((LAST_NORM,), "lost"),),
        at=WAYS,
        causes=_kind("missing tensors", LAST_NORM),
    ),
    Fault(
        name="biases lost",
        family="missing",
        source="mlc-llm #3494",
        does=(Presence(LINEARS, "lost", "bias"),),
        at=WAYS,
        needs=("bias",),
        causes=_kind("missing tensors", *(f"{name}.bias" for name in LINEARS)),
    ),
    Fault(
        name="a tensor that nobody asked for",
        family="missing",
        source="MB #4083",
        does=(Presence(("model.extra.weight",), "added"),),
        at=WAYS,
        causes=_kind("extra tensors", "model.extra"),
    ),
    Fault(
        name="layers split over two files skipped",
        family="missing",
        source="TE #730",
        does=(Broken("straddling layer skipped"),),
        at=WAYS,
        causes=(Cause(kind="initial values"),),
    ),
)

VOCABULARY = (
    *(
        Fault(
            name=name,
            family="vocabulary",
            source=source,
            does=(Resize(EMBED, by, config), Resize(HEAD, by, config)),
            at=WAYS,
            causes=(Cause(kind="padding", what=(EMBED,)), Cause(kind="shape", what=(EMBED,)))
            + (Cause(kind="config", what=("vocab_size",)),) * config,
        )
        for name, source, by, config in (
            ("padding kept", "MB #625", 1, False),
            ("padding kept, and in the config", "MB #5375", 1, True),
            ("padding added twice", "MB #5375", 2, False),
            ("padding stripped twice", "MB #5353", -1, False),
            ("padding stripped twice, and in the config", "MB #5353", -1, True),
        )
    ),
    Fault(
        name="vocabulary rows shifted",
        family="vocabulary",
        source="MB #5353",
        does=(Roll(EMBED, 1),),
        causes=_kind("rows shifted", EMBED),
    ),
    Fault(
        name="vocabulary rows of the head shifted",
        family="vocabulary",
        source="MB #5353",
        does=(Roll(HEAD, -1),),
        needs=("untied",),
        causes=_kind("rows shifted", HEAD),
    ),
    Fault(
        name="vocabulary halves exchanged",
        family="vocabulary",
        source="MB #625",
        does=(Shards((EMBED,), "rows"), Shards((HEAD,), "rows")),
        needs=("tp",),
        causes=_rows(EMBED) + _rows(EMBED, HEAD),
    ),
    Fault(
        name="an unused row not a number",
        family="vocabulary",
        source="a row that was never trained",
        does=(Values((EMBED,), "nan", rows="last"),),
        at=WAYS,
        causes=_kind("not numbers", EMBED),
    ),
    Fault(
        name="an unused row zero",
        family="vocabulary",
        source="a row that was never trained",
        does=(Values((EMBED,), "zeros", rows="last"),),
        at=WAYS,
        causes=_kind("zeros", EMBED),
    ),
    Fault(
        name="two unused rows exchanged",
        family="vocabulary",
        source="invisible to ordinary text",
        does=(SwapRows(EMBED, -1, -2),),
        causes=_kind("rows exchanged", EMBED),
    ),
    Fault(
        name="padding rows not zero",
        family="vocabulary",
        source="MB #625",
        does=(Live(r"^embedding\.word_embeddings\.weight$", "padding", "tp"),),
        at=IMPORT,
        needs=("padding", "tp"),
        causes=_kind("padding", EMBED),
    ),
)

DTYPE = (
    Fault(
        name="rounded to bf16",
        family="dtype",
        source="miles #975",
        does=(Values(LINEARS, "rounded"),),
        at=WAYS,
        causes=_kind("rounded", *LINEARS),
    ),
    Fault(
        name="norms rounded to bf16",
        family="dtype",
        source="miles #975",
        does=(Values((NORM,), "rounded"),),
        at=WAYS,
        causes=_kind("rounded", NORM),
    ),
    Fault(
        name="embedding rounded to bf16",
        family="dtype",
        source="miles #975",
        does=(Values((EMBED,), "rounded"),),
        at=WAYS,
        causes=_kind("rounded", EMBED),
    ),
    Fault(
        name="truncated to bf16",
        family="dtype",
        source="miles #975",
        does=(Values(LINEARS, "truncated"),),
        at=WAYS,
        causes=_kind("truncated", *LINEARS),
    ),
    Fault(
        name="written in bf16",
        family="dtype",
        source="miles #975",
        does=(Retype((*LINEARS,), "BF16"),),
        at=EXPORT,
        causes=_kind("dtype", *LINEARS),
    ),
)

VERIFIER = (
    Fault(
        name="the lowest bit of one number",
        family="verifier",
        source="a tolerance",
        does=(Values((DOWN,), "last bit", rows="last", columns="last"),),
        causes=(),
    ),
    Fault(
        name="down_proj scaled",
        family="verifier",
        source="a gate on cosine similarity",
        does=(Values((DOWN,), "scaled"),),
        at=WAYS,
        causes=(),
    ),
    Fault(
        name="rows of o_proj moved by one",
        family="verifier",
        source="mbridge: a sum that no permutation changes",
        does=(Roll(O, 1),),
        causes=_kind("rows shifted", O) + _rows(O),
    ),
    Fault(
        name="last number of k_proj zero",
        family="verifier",
        source="Automodel #3635: a gate on a prefix",
        does=(Values((K,), "zeros", rows="last", columns="last"),),
        at=WAYS,
        causes=_kind("zeros", K),
    ),
    Fault(
        name="a weight not a number",
        family="verifier",
        source="comparisons that NaN passes",
        does=(Values((V,), "nan", rows="last", columns="last"),),
        at=WAYS,
        causes=_kind("not numbers", V),
    ),
    Fault(
        name="an infinite weight",
        family="verifier",
        source="comparisons that infinity passes",
        does=(Values((UP,), "infinity", rows="last", columns="last"),),
        at=WAYS,
        causes=_kind("not numbers", UP),
    ),
)

FAULTS = (*LAYOUT, *MISSING, *VOCABULARY, *DTYPE, *VERIFIER)
