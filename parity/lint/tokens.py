"""Rules on the tokenizer, token ids and what generation stops at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parity.lint.folder import TOKENIZERS, Folder, Unavailable
from parity.lint.rules import Remark, Severity, rule, some

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
GENERATION = "generation_config.json"


@rule("tokenizer", "there is a tokenizer, with its settings")
def tokenizer(folder: Folder) -> Iterator[Remark]:
    lacking = []
    if not any(folder.has(name) for name in TOKENIZERS):
        lacking.append(TOKENIZERS[0])
    if not folder.has("tokenizer_config.json"):
        lacking.append("tokenizer_config.json")
    if lacking:
        yield Remark(
            severity="warning",
            where=", ".join(lacking),
            expected="the tokenizer that the model was trained with, beside its weights",
            found="no such file",
            advice="copy it from the model that was exported",
        )


@rule("vocabulary", "every token id has a row in the embedding")
def vocabulary(folder: Folder) -> Iterator[Remark]:
    rows = folder.hf["vocab_size"]
    beyond = {token: index for token, index in folder.tokens.items() if not 0 <= index < rows}
    if beyond:
        highest = max(beyond, key=lambda token: beyond[token])
        yield Remark(
            severity="error",
            where="tokenizer.json",
            expected=f"token ids below {rows:,} (vocab_size, the rows of the embedding)",
            found=f"{len(beyond):,} tokens without a row, up to {highest!r} with id {beyond[highest]:,}",
            advice="the tokenizer is another model's, or the embedding was cut: export again with padding stripped to "
            "the true vocabulary",
            items=tuple(f"{token!r}: {index}" for token, index in beyond.items()),
        )


@rule("unused-rows", "rows of the embedding that no token has")
def unused_rows(folder: Folder) -> Iterator[Remark]:
    rows, held = folder.hf["vocab_size"], {index for index in folder.tokens.values() if index >= 0}
    unused = rows - len({index for index in held if index < rows})
    if unused > 0:
        after = max(0, rows - max(held) - 1)
        yield Remark(
            severity="note",
            where="tokenizer.json, config.json: vocab_size",
            expected=f"as many tokens as rows ({rows:,})",
            found=f"{unused:,} rows have no token, {after:,} of them after the last token",
            advice="nothing if the original has them; rows after the last token may be padding that was not stripped",
        )


@rule("token-range", "bos, eos and pad ids are rows of the embedding")
def token_range(folder: Folder) -> Iterator[Remark]:
    rows = folder.hf["vocab_size"]
    for name, config in _configs(folder):
        for field in IDS:
            wrong = [index for index in _ids(config, field) if not _is_id(index) or not 0 <= index < rows]
            if wrong:
                # -1 has been written for `no padding`; transformers takes it for the last row.
                mild = field == "pad_token_id" and wrong == [-1]
                yield Remark(
                    severity="warning" if mild else "error",
                    where=f"{name}: {field}",
                    expected=f"whole numbers from 0 to {rows - 1:,}",
                    found=", ".join(map(repr, wrong)),
                    advice="leave it out where there is none" if mild else "set the id that the tokenizer gives",
                )


@rule("generation-config", "generation_config.json is there, and holds an object")
def generation_config(folder: Folder) -> Iterator[Remark]:
    severity: Severity = "error"
    if not folder.has(GENERATION):
        severity, found = "note", "no such file; what config.json says of generation counts"
    else:
        held = folder.parsed(GENERATION)
        found = "" if isinstance(held, dict) else f"{type(held).__name__}, no object"
    if found:
        yield Remark(
            severity=severity,
            where=GENERATION,
            expected="the settings that `generate` starts from",
            found=found,
            advice="copy it from the model that was exported, if it has one",
        )


@rule("eos-lists", "config.json and generation_config.json stop at the same tokens")
def eos_lists(folder: Folder) -> Iterator[Remark]:
    generation = folder.object(GENERATION)
    if generation is None:
        return  # then config.json counts, for everybody
    mine, theirs = (set(_whole(found, IDS[1])) for found in (folder.config, generation))
    if mine == theirs:
        return
    severity: Severity = "error"
    if not mine:
        severity, why = "note", "loaders that read only config.json know no stop token"
    elif not theirs:
        why = "`generate` of transformers takes the second and never stops"
    elif mine < theirs:
        severity = "warning"
        why = "`generate` of transformers stops at the second; loaders that read only config.json go on past "
        why += some([str(index) for index in sorted(theirs - mine)])
    elif theirs < mine:
        why = "`generate` of transformers takes the second and goes on past "
        why += some([str(index) for index in sorted(mine - theirs)])
    else:
        why = "they disagree on where to stop"
    yield Remark(
        severity=severity,
        where=f"config.json, {GENERATION}: eos_token_id",
        expected="the same ids in both",
        found=f"{_shown(mine)} in the first, {_shown(theirs)} in the second: {why}",
        advice="write the list of all stop tokens into both",
    )


@rule("special-tokens", "bos, eos and pad of the tokenizer are those of config.json and generation_config.json")
def special_tokens(folder: Folder) -> Iterator[Remark]:
    settings = folder.object("tokenizer_config.json")
    if settings is None:
        raise Unavailable("there is no tokenizer_config.json")
    settings = {**(folder.object("special_tokens_map.json") or {}), **settings}
    tokens = folder.tokens
    for field in IDS:
        name = field.removesuffix("_id")
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        known = {
            which: ids for which, config in _configs(folder) if (ids := [i for i in _whole(config, field) if i != -1])
        }
        if token is None:
            continue
        if not isinstance(token, str) or token not in tokens:
            yield Remark(
                severity="error",
                where=f"tokenizer_config.json: {name}",
                expected="a token of tokenizer.json",
                found=f"{token!r}, which has no id there; transformers adds a new one, without a row",
                advice="correct its name, or take the tokenizer that belongs to the model",
            )
            continue
        # Several stop tokens: the tokenizer's is one of them. Of the others there is one.
        told = {index for ids in known.values() for index in ids}
        agree = tokens[token] in told if field == "eos_token_id" else told <= {tokens[token]}
        if known and not agree:
            yield Remark(
                severity="warning",
                where=f"tokenizer_config.json: {name}",
                expected=" and ".join(f"{_shown(set(ids))} ({which})" for which, ids in known.items()),
                found=f"{token!r}, whose id is {tokens[token]}",
                advice="templates and training end a turn with the tokenizer's: see which is right, and set all alike",
            )


def _configs(folder: Folder) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "config.json", folder.config
    generation = folder.object(GENERATION)
    if generation is not None:
        yield GENERATION, generation


def _ids(config: dict[str, Any], field: str) -> list[Any]:
    value = config.get(field)
    return [] if value is None else value if isinstance(value, list) else [value]


def _whole(config: dict[str, Any], field: str) -> list[int]:
    """The ids that are whole numbers; of others, token-range speaks."""
    return [index for index in _ids(config, field) if _is_id(index)]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(ids: set[Any]) -> str:
    return f"{sorted(ids, key=str)}" if len(ids) > 1 else str(next(iter(ids), "none"))
