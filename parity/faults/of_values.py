"""Faults of vocabulary rows and of values, and those that a weak verifier lets pass."""

from __future__ import annotations

from parity.causes import Cause
from parity.faults.catalogue import Fault
from parity.faults.mutations import Live, Resize, Retype, Roll, Shards, SwapRows, Values
from parity.faults.words import DOWN, EMBED, EXPORT, HEAD, IMPORT, LINEARS, NORM, UP, WAYS, K, O, Q, V, of_kind, rows

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
        causes=of_kind("rows shifted", EMBED),
    ),
    Fault(
        name="vocabulary rows of the head shifted",
        family="vocabulary",
        source="MB #5353",
        does=(Roll(HEAD, -1),),
        needs=("untied",),
        causes=of_kind("rows shifted", HEAD),
    ),
    Fault(
        name="vocabulary halves exchanged",
        family="vocabulary",
        source="MB #625",
        does=(Shards((EMBED,), "rows"), Shards((HEAD,), "rows")),
        needs=("tp",),
        causes=rows(EMBED) + rows(EMBED, HEAD),
    ),
    Fault(
        name="an unused row not a number",
        family="vocabulary",
        source="a row that was never trained",
        does=(Values((EMBED,), "nan", rows="last"),),
        at=WAYS,
        causes=of_kind("not numbers", EMBED),
    ),
    Fault(
        name="an unused row zero",
        family="vocabulary",
        source="a row that was never trained",
        does=(Values((EMBED,), "zeros", rows="last"),),
        at=WAYS,
        causes=of_kind("zeros", EMBED),
    ),
    Fault(
        name="two unused rows exchanged",
        family="vocabulary",
        source="invisible to ordinary text",
        does=(SwapRows(EMBED, -1, -2),),
        causes=of_kind("rows exchanged", EMBED),
    ),
    Fault(
        name="padding rows not zero",
        family="vocabulary",
        source="MB #625",
        does=(Live(r"^(embedding\.word_embeddings|model\.embed_tokens)\.weight$", "padding", "tp"),),
        at=IMPORT,
        needs=("padding", "tp"),
        causes=of_kind("padding", EMBED),
    ),
    Fault(
        name="group of zeros not zero",
        family="vocabulary",
        source="key-value groups added for tp",
        does=(Live(r"layernorm_qkv\.weight$", "last row", "tp"),),
        at=IMPORT,
        needs=("ghosts", "tp"),
        causes=of_kind("padding", Q, K, V) + of_kind("padding", V),
        backends=("te",),
    ),
)

DTYPE = (
    Fault(
        name="rounded to bf16",
        family="dtype",
        source="miles #975",
        does=(Values(LINEARS, "rounded"),),
        at=WAYS,
        causes=of_kind("rounded", *LINEARS),
    ),
    Fault(
        name="norms rounded to bf16",
        family="dtype",
        source="miles #975",
        does=(Values((NORM,), "rounded"),),
        at=WAYS,
        causes=of_kind("rounded", NORM),
    ),
    Fault(
        name="embedding rounded to bf16",
        family="dtype",
        source="miles #975",
        does=(Values((EMBED,), "rounded"),),
        at=WAYS,
        causes=of_kind("rounded", EMBED),
    ),
    Fault(
        name="truncated to bf16",
        family="dtype",
        source="miles #975",
        does=(Values(LINEARS, "truncated"),),
        at=WAYS,
        causes=of_kind("truncated", *LINEARS),
    ),
    Fault(
        name="written in bf16",
        family="dtype",
        source="miles #975",
        does=(Retype((*LINEARS,), "BF16"),),
        at=EXPORT,
        causes=of_kind("dtype", *LINEARS),
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
        causes=of_kind("rows shifted", O) + rows(O),
    ),
    Fault(
        name="last number of k_proj zero",
        family="verifier",
        source="Automodel #3635: a gate on a prefix",
        does=(Values((K,), "zeros", rows="last", columns="last"),),
        at=WAYS,
        causes=of_kind("zeros", K),
    ),
    Fault(
        name="a weight not a number",
        family="verifier",
        source="comparisons that NaN passes",
        does=(Values((V,), "nan", rows="last", columns="last"),),
        at=WAYS,
        causes=of_kind("not numbers", V),
    ),
    Fault(
        name="an infinite weight",
        family="verifier",
        source="comparisons that infinity passes",
        does=(Values((UP,), "infinity", rows="last", columns="last"),),
        at=WAYS,
        causes=of_kind("not numbers", UP),
    ),
)

FAULTS = (*VOCABULARY, *DTYPE, *VERIFIER)
