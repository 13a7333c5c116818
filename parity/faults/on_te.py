"""Which faults of checkpoints are tried on Transformer Engine's layers as well: each kind of rule is hit by some.

The rest would prove nothing more there: they mutate files, which a backend does not see.
"""

from __future__ import annotations

ON_TE = frozenset(
    {
        # rows of query, key and value, in groups, over tp
        "k and v exchanged",
        "qkv grouped, read as contiguous",
        "query heads not group by group",
        "rope permutation of q alone",
        "row shards of q_proj exchanged",
        "qkv of the live model at its initial value",
        "last shard of q_proj zero",
        # gate and up
        "gate and up exchanged",
        "fc1 cut contiguously under tp",
        "interleaved gate and up not undone",
        "fc1 of the last tp rank zero",
        # columns: output and down projection
        "column shards of o_proj exchanged",
        "column shards of down_proj exchanged",
        "o_proj heads mapped wrongly",
        "down_proj of the last cp rank at its initial value",
        # biases, of which the layers have one switch for all four linears
        "biases of gate and up exchanged",
        "qkv bias not merged like its weight",
        "biases zero",
        "biases lost",
        # norms, which are parameters of the linear that follows
        "norms exchanged",
        "norms zero-centred",
        "norms of the last tp rank at ones",
        "final norm at ones",
        # layers
        "two layers exchanged",
        # embedding and head, cut and padded over tp
        "head a copy of the embedding",
        "head lost",
        "vocabulary halves exchanged",
        "vocabulary rows shifted",
        "padding stripped twice",
        "padding rows not zero",
        # fields
        "rope factor always 8",
        "eps 1e-6",
        "head_dim lost",
        "gelu for silu",
        "tie flag flipped",
        "attention_bias without biases",
        "groups as many as heads",
        # bits and files
        "rounded to bf16",
        "the lowest bit of one number",
        "a shard lost",
        "tokenizer stale",
        "several stop tokens become one",
        # ranks
        "ranks: a rank raises",
    }
)
"""Names of faults."""
