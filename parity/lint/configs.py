"""Rules on JSON files and on the fields of config.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from converters.errors import ConversionError
from converters.models import FAMILIES
from parity.lint.folder import ROPE_NEW, Folder, Json, Unavailable
from parity.lint.rules import Remark, rule, some

DEFAULT_THETA = 10000.0
"""What transformers takes where no rope_theta is found."""


@rule("json", "every JSON file parses, and names no key twice")
def json_files(folder: Folder) -> Iterator[Remark]:
    for path in folder.entries:
        if path.suffix != ".json" or not (folder.path / path).is_file():
            continue
        twice: list[str] = []

        def pairs(found: list[tuple[str, Any]], twice: list[str] = twice) -> Json:
            names = [name for name, _ in found]
            twice += sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ())
            return dict(found)

        try:
            json.loads(folder.text(path.as_posix()), object_pairs_hook=pairs)
            problem = f"{some(twice)} twice; the last one counts" if twice else ""
        except (ValueError, RecursionError, Unavailable) as error:
            problem = str(error) or type(error).__name__
        if problem:
            yield Remark(
                severity="error",
                where=path.as_posix(),
                expected="JSON in UTF-8 with each key once",
                found=problem,
                advice="write the file again",
            )


@rule("config", "there is a config.json, and it holds an object")
def config(folder: Folder) -> Iterator[Remark]:
    found = "no such file"
    if folder.has("config.json"):
        held = folder.parsed("config.json")
        found = "" if isinstance(held, dict) else type(held).__name__
    if found:
        yield Remark(
            severity="error",
            where="config.json",
            expected="the object of a model's config",
            found=found,
            advice="export again, or copy the config of the model that was exported",
        )


@rule("architectures", "model_type and architectures name a model that is known, and the same one")
def architectures(folder: Folder) -> Iterator[Remark]:
    _ = folder.config  # that it is there is another rule's
    try:
        family = folder.family
    except Unavailable as error:
        yield Remark(
            severity="error",
            where="config.json: model_type",
            expected=f"one of {', '.join(known.name for known in FAMILIES)}",
            found=str(error),
            advice="set model_type to the family's",
        )
        return
    # The class of a dialect's model has the dialect's prefix, which its own reading takes off.
    named = family.hf_config(folder.config).get("architectures")
    if named != [family.architecture]:
        yield Remark(
            severity="error",
            where="config.json: architectures",
            expected=repr([family.architecture]),
            found=repr(named),
            advice="set it: serving engines choose the model's class by it",
        )


@rule("config-fields", "every config field is known, has a value that it can have, and is spelled once or alike")
def config_fields(folder: Folder) -> Iterator[Remark]:
    family = folder.family
    # Of these, other rules speak.
    others = ("architectures", "auto_map", "quantization_config")
    given = {name: value for name, value in folder.config.items() if name not in others}
    if _disagreements(folder.config):
        given = {name: value for name, value in given.items() if name not in ("rope_scaling", "rope_theta")}
    if given.get("dtype") and given.get("torch_dtype"):
        del given["torch_dtype"]
    try:
        family.fields.check(family.hf_config(given))
        folder.planned()
    except ConversionError as error:
        _, *problems = str(error).splitlines()
        yield Remark(
            severity="error",
            where="config.json",
            expected=f"fields of a {family.name} model, with values that every format can have",
            found="; ".join(problem.strip() for problem in problems) or str(error),
            advice="remove fields that mean nothing; a field that means something cannot be dropped in silence",
            items=tuple(problem.strip() for problem in problems),
        )


@rule("rope-spellings", "rope_parameters (transformers 5) and rope_scaling, rope_theta (4) say the same to each reader")
def rope_spellings(folder: Folder) -> Iterator[Remark]:
    config = folder.config
    if differing := _disagreements(config):
        yield Remark(
            severity="error",
            where="config.json: rope_parameters, rope_scaling, rope_theta",
            expected="the same values in both spellings, or one spelling",
            found="; ".join(differing),
            advice="transformers 4 reads rope_scaling and rope_theta alone, 5 prefers rope_scaling: set them alike",
        )
        return
    new = config.get(ROPE_NEW)
    if not isinstance(new, dict):
        return  # Both versions read the old spelling.
    unread = {name: value for name, value in _flat(new).items() if name not in _old(config)}
    if unread.get("rope_theta") == DEFAULT_THETA:
        del unread["rope_theta"]
    if unread.get("rope_type") == "default":
        del unread["rope_type"]
    if unread:
        version = str(config.get("transformers_version", ""))
        yield Remark(
            severity="note"
            if version.partition(".")[0].isdigit() and int(version.partition(".")[0]) >= 5
            else "warning",
            where="config.json: rope_parameters",
            expected="rope_theta and rope_scaling as well, where transformers 4 or what is built on it is to load this",
            found=f"only transformers 5 reads {', '.join(f'{name}={value!r}' for name, value in unread.items())}; "
            f"4 takes rope_theta={DEFAULT_THETA:g} and no scaling without a word"
            + (f" (transformers_version={version!r})" if version else ""),
            advice="add the old spelling with the same values; transformers 5 reads it too",
        )


def _flat(rope: Json) -> Json:
    return {"rope_type" if name == "type" else name: value for name, value in rope.items() if value is not None}


def _old(config: Json) -> Json:
    """The rope fields that transformers 4 reads."""
    scaling = config.get("rope_scaling")
    theta = {} if config.get("rope_theta") is None else {"rope_theta": config["rope_theta"]}
    return (_flat(scaling) if isinstance(scaling, dict) else {}) | theta


def _disagreements(config: Json) -> list[str]:
    """What the two spellings say differently of the same field."""
    new, old = config.get(ROPE_NEW), _old(config)
    if not isinstance(new, dict):
        scaling = config.get("rope_scaling")
        inner = scaling.get("rope_theta") if isinstance(scaling, dict) else None
        outer = config.get("rope_theta")
        differ = None not in (inner, outer) and inner != outer
        return [f"rope_theta is {outer!r}, in rope_scaling {inner!r}"] if differ else []
    flat = _flat(new)
    said = [
        f"{name} is {flat[name]!r} in rope_parameters and {old[name]!r} in the old spelling"
        for name in flat
        if name in old and flat[name] != old[name]
    ]
    # A scaling in the old spelling stands alone in transformers 4: what it lacks is not taken from elsewhere.
    if isinstance(config.get("rope_scaling"), dict):
        said += [f"rope_parameters lacks {name}={value!r}" for name, value in old.items() if name not in flat]
        lacking = [name for name in flat if name not in old and name != "rope_theta"]
        said += [f"rope_scaling lacks {name}={flat[name]!r}" for name in lacking]
    return said
