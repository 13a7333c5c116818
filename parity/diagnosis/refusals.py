"""What a failing rank's message names: tensors, files, config fields. A refusal is a diagnosis too."""

from __future__ import annotations

import re

from parity.causes import Cause, field_name, shorts
from parity.rank_failure import RankFailure

_KEY = re.compile(r"\b(?:model\.\w[\w.]*\.(?:weight|bias)|lm_head\.weight)\b")
_FILE = re.compile(r"[\w-]+(?:\.[\w-]+)*\.(?:safetensors(?:\.index\.json)?|json|jinja|model)\b")
_FIELD = re.compile(r"(?m)^\s*(?:[\w.]*Error: )?([a-z]\w*(?:\.\w+)*)(?:=| is missing|: )|its default is (\w+)")
_RAISED = re.compile(r"(?m)^[A-Za-z_][\w.]*(?:Error|Exception|Exit|Failure)(?::|$)")
_LISTS = (
    (
        "missing tensors",
        re.compile(r"tensors missing \(\d+\):\n((?:  .*(?:\n|$))+)|Missing key\(s\) in state_dict: (.*)"),
    ),
    (
        "extra tensors",
        re.compile(r"tensors that nothing maps \(\d+\):\n((?:  .*(?:\n|$))+)|Unexpected key\(s\).*?: (.*)"),
    ),
    ("shape", re.compile(r"tensors of another shape \(\d+\):\n((?:  .*(?:\n|$))+)|(size mismatch for .*)")),
    ("missing tensors", re.compile(r"KeyError: (.*)")),
    ("padding", re.compile(r"(.*elements that must be 0 are not.*)")),
    ("untied", re.compile(r"(\S+ is a tied copy of \S+), and differs")),
)
_UNREADABLE = re.compile(
    r"SafetensorError|files that cannot be|the index promises|which the index lacks|no index|not an index|"
    r"names files that are not there|names weight files that are not|has no safetensors weights|"
    r"expected model\.safetensors|is truncated|not a safetensors file|FileNotFoundError"
)
_IN_MEGATRON = (
    ("output_layer.weight", ("lm_head",)),
    ("embedding.word_embeddings.weight", ("model.embed_tokens",)),
    ("linear_qkv.bias", ("q_proj.bias", "k_proj.bias", "v_proj.bias")),
    ("linear_proj.bias", ("o_proj.bias",)),
    ("linear_fc1.bias", ("gate_proj.bias", "up_proj.bias")),
    ("linear_fc2.bias", ("down_proj.bias",)),
)
"""Parameters that a refused export may name, and the HF tensors that they are made of."""
_TABLE_NAMES = {
    "rope_type": "rope_scaling.rope_type",
    "rope_factor": "rope_scaling.factor",
    "rope_low_freq_factor": "rope_scaling.low_freq_factor",
    "rope_high_freq_factor": "rope_scaling.high_freq_factor",
    "rope_original_length": "rope_scaling.original_max_position_embeddings",
}


def causes_of(failure: RankFailure) -> tuple[Cause, ...]:
    """The causes that a failure names; that a rank failed, where it names none."""
    message = f"{failure}\n{failure.traceback}"
    where = f"rank {failure.rank}" + f" ({failure.coord})" * bool(failure.coord)
    first = next((line for line in failure.traceback.splitlines()[::-1] if "Error" in line), "").strip()
    if failure.kind != "exception":
        return (Cause(kind="ranks", where=where, detail=failure.kind),)
    out = []
    for kind, listed in _LISTS:
        parts = [part for found in listed.finditer(message) for part in found.groups() if part]
        if keys := {key for part in parts for key in _keys(part)}:
            out.append(Cause(kind=kind, what=shorts(keys)))
    if _UNREADABLE.search(message):
        out.append(Cause(kind="unreadable", what=tuple(sorted(set(_FILE.findall(message)))), detail=first))
    if "dtypes differ" in message:
        out.append(Cause(kind="dtype", what=shorts(_KEY.findall(message))))
    if "ConfigError" in message or "config of a" in message:
        out += _of_config(_raised(failure))
    return tuple(out) or (Cause(kind="ranks", where=where, detail=first),)


def _keys(text: str) -> list[str]:
    """The HF tensors that a message names, by their own names or by those of the parameters made of them."""
    return [*_KEY.findall(text), *(key for name, keys in _IN_MEGATRON if name in text for key in keys)]


def _raised(failure: RankFailure) -> str:
    """What the exception says, without the lines of code that led to it."""
    starts = [found.start() for found in _RAISED.finditer(failure.traceback)]
    return failure.traceback[starts[-1] :] if starts else str(failure)


def _of_config(message: str) -> list[Cause]:
    _, named, rest = message.partition("config of a")
    text = rest.partition("\n")[2] if named else message
    found = [name or default for name, default in _FIELD.findall(text)]
    names = {_TABLE_NAMES.get(name, field_name(name)) for name in found if "rror" not in name}
    unused = {name for name in _TABLE_NAMES if re.search(rf"(?m)^\s*{name}=.*: no row of the ledger uses it", text)}
    causes = [Cause(kind="config", what=tuple(sorted(names)))]
    if unused:  # fields that its type does not have: it is one type that is wrong, rather than several fields
        detail = f"the type has no {', '.join(sorted(_TABLE_NAMES[name] for name in unused))}"
        causes.insert(0, Cause(kind="config", what=(_TABLE_NAMES["rope_type"],), detail=detail))
    return causes
