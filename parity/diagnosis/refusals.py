"""What a failing rank's message names: tensors, files, config fields. A refusal is a diagnosis too."""

from __future__ import annotations

import re

from parity.causes import Cause, field_name, shorts
from parity.rank_failure import RankFailure

_KEY = re.compile(r"\b(?:model\.(?:layers\.\d+\.[\w.]+\w|embed_tokens\.weight|norm\.weight)|lm_head\.weight)")
_FILE = re.compile(r"[\w-]+(?:\.[\w-]+)*\.(?:safetensors(?:\.index\.json)?|json|jinja|model)\b")
_FIELD = re.compile(r"(?m)^\s*(?:[\w.]*Error: )?([a-z]\w*(?:\.\w+)*)(?:=| is missing|: )")
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
)
_UNREADABLE = re.compile(
    r"SafetensorError|files that cannot be|the index promises|which the index lacks|no index|not an index|"
    r"names files that are not there|expected model\.safetensors|is truncated|not a safetensors file|FileNotFoundError"
)
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
        keys = {
            key for found in listed.finditer(message) for part in found.groups() if part for key in _KEY.findall(part)
        }
        if keys:
            out.append(Cause(kind=kind, what=shorts(keys)))
    if _UNREADABLE.search(message):
        out.append(Cause(kind="unreadable", what=tuple(sorted(set(_FILE.findall(message)))), detail=first))
    if "dtypes differ" in message:
        out.append(Cause(kind="dtype", what=shorts(_KEY.findall(message))))
    if "ConfigError" in message or "config of a" in message:
        found = [name for name in _FIELD.findall(_config_part(message)) if "self." not in name and "rror" not in name]
        names = {_TABLE_NAMES.get(name, field_name(name)) for name in found}
        out.append(Cause(kind="config", what=tuple(sorted(names))))
    return tuple(out) or (Cause(kind="ranks", where=where, detail=first),)


def _config_part(message: str) -> str:
    return message.partition("config of a")[2].partition("\n")[2] or message
