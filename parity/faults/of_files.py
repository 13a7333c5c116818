"""Faults of files, of weight files and their index, and of config fields."""

from __future__ import annotations

from parity.causes import Cause
from parity.faults.catalogue import At, Fault
from parity.faults.mutations import Broken, ConfigField, File

WAYS: tuple[At, ...] = ("import", "export")
EXPORT: tuple[At, ...] = ("export",)

FILES = (
    *(
        Fault(
            name=name,
            family="files",
            source=source,
            does=(Broken(how),),  # type: ignore[arg-type]  # literals, below
            at=at,
            causes=tuple(Cause(kind=kind) for kind in kinds),
        )
        for name, how, at, source, kinds in (
            ("a shard of layers never written", "boundary shard never written", WAYS, "MB #4188", ("missing tensors",)),
            ("the index promises a key", "index promises", WAYS, "huggingface_hub #4728", ("unreadable",)),
            ("the index lacks a key", "index lacks", WAYS, "MB #4083", ("unreadable", "missing tensors")),
            ("a shard lost", "shard lost", WAYS, "MB #4083", ("unreadable",)),
            ("nothing saved", "nothing saved", WAYS, "MB #1883", ("unreadable", "missing tensors")),
            (
                "a stale file beside the shards",
                "stale file beside shards",
                EXPORT,
                "transformers prefers it",
                ("files",),
            ),
            ("a shard that no index names", "shard that no index names", EXPORT, "MB #4083", ("files",)),
            ("a truncated file", "truncated", WAYS, "an interrupted upload", ("unreadable",)),
            ("overlapping tensors", "overlapping", WAYS, "a header that was written wrongly", ("unreadable",)),
            ("another dtype in the header", "header dtype", WAYS, "dtype recorded wrongly", ("dtype", "unreadable")),
            ("the source's weights, whatever was trained", "the source's files", EXPORT, "MB #1883", ()),
        )
    ),
    *(
        Fault(
            name=name,
            family="files",
            source=source,
            does=(File(file, how),),  # type: ignore[arg-type]  # literals, below
            at=EXPORT,
            causes=(Cause(kind="files", what=(file,)),),
        )
        for name, file, how, source in (
            ("tokenizer lost", "tokenizer.json", "lost", "MB #645"),
            ("tokenizer stale", "tokenizer.json", "stale", "MB #3924"),
            ("tokenizer config lost", "tokenizer_config.json", "lost", "MB #645"),
            ("chat template lost", "chat_template.jinja", "lost", "MB #3924"),
            ("chat template stale", "chat_template.jinja", "stale", "MB #3924"),
            ("generation config lost", "generation_config.json", "lost", "MB #4687"),
            ("several stop tokens become one", "generation_config.json", "one id", "colibri #1478"),
            ("config lost", "config.json", "lost", "MB #645"),
        )
    ),
)

_FIELDS = (
    # name, source, field, how, value, needs, at, the field's name in full
    ("rope scaling dropped", "MB #5097", "rope", "lost", None, ("rope scaling",), None, "rope_scaling"),
    (
        "rope factor always 8",
        "llama-models #241, executorch #7265",
        "rope.factor",
        "set",
        8.0,
        ("rope scaling",),
        None,
        "",
    ),
    ("rope theta 10000", "marin #7156", "rope_theta", "set", 10000.0, (), None, ""),
    ("low_freq_factor ignored", "ML hard-codes it", "rope.low_freq_factor", "set", 1.0, ("rope scaling",), None, ""),
    ("high_freq_factor ignored", "ML hard-codes it", "rope.high_freq_factor", "set", 4.0, ("rope scaling",), None, ""),
    (
        "original length ignored",
        "ML hard-codes it",
        "rope.original_max_position_embeddings",
        "set",
        8192,
        ("rope scaling",),
        None,
        "",
    ),
    (
        "rope type not known",
        "a type that is not refused",
        "rope.rope_type",
        "set",
        "linear",
        ("rope scaling",),
        None,
        "",
    ),
    ("eps 1e-6", "MB #5712", "rms_norm_eps", "set", 1e-6, (), None, ""),
    ("eps 1e-5", "MB #5712", "rms_norm_eps", "set", 1e-5, (), None, ""),
    ("head_dim lost", "Fast-LLM #102, ML #1655", "head_dim", "lost", None, ("own head_dim",), WAYS, ""),
    ("gelu for silu", "MB #4661", "hidden_act", "set", "gelu", (), None, ""),
    ("sliding window gained", "MB #4800", "sliding_window", "set", 64, (), WAYS, ""),
    ("max_position_embeddings rewritten", "MB #5994", "max_position_embeddings", "times", 4, (), WAYS, ""),
    ("tie flag flipped", "MB #957", "tie_word_embeddings", "negate", None, (), WAYS, ""),
    ("attention_bias without biases", "set with no mapping", "attention_bias", "set", True, ("no bias",), WAYS, ""),
    ("mlp_bias without biases", "set with no mapping", "mlp_bias", "set", True, ("no bias",), WAYS, ""),
    ("vocab_size padded", "MB #5375", "vocab_size", "times", 1.02, (), WAYS, ""),
    ("a layer too many", "ms-swift #6644", "num_hidden_layers", "times", 1.25, (), WAYS, ""),
    ("groups as many as heads", "gpt-neox #1345", "num_key_value_heads", "lost", None, ("grouped",), WAYS, ""),
    ("dtype recorded wrongly", "Automodel #2549", "torch_dtype", "set", "float16", (), EXPORT, "dtype"),
)

_IN_TENSORS = frozenset(
    {
        "head_dim",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "vocab_size",
        "num_hidden_layers",
        "num_key_value_heads",
    }
)
"""Fields that tensors disagree with: which of the two is wrong cannot be told."""


def _causes(field: str, full: str) -> tuple[Cause, ...]:
    name = full or field.replace("rope.", "rope_scaling.")
    named = [Cause(kind="config", what=(name,))]
    if field.startswith("rope") and field != "rope_theta":  # its type stands for its fields, and the reverse
        parts = ("factor", "rope_type", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        named += [
            Cause(kind="config", what=(f"rope_scaling.{part}",))
            for part in parts
            if field in ("rope", "rope.rope_type")
        ]
    if field in _IN_TENSORS:
        named += [Cause(kind="missing tensors"), Cause(kind="extra tensors"), Cause(kind="shape")]
    return tuple(named)


CONFIG = tuple(
    Fault(
        name=name,
        family="config",
        source=source,
        does=(ConfigField(field, how, value),),  # type: ignore[arg-type]  # literals, above
        at=at or ("import", "export", "cancel"),
        needs=needs,
        causes=_causes(field, full),
    )
    for name, source, field, how, value, needs, at, full in _FIELDS
)

FAULTS = (*FILES, *CONFIG)
