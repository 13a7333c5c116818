"""What a model is asked: token ids with labels, positions and segments, as plain arrays.

Each probe sees what the others cannot: prose, what a user sees first; the vocabulary, rows that ordinary text never
asks for; positions, angles that lie beyond its length; a long sequence, attention over it; left padding and packing,
whether a token sees what is not its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

IGNORED = -100
"""The label of a token that nothing follows, as transformers and torch have it."""
WORK = 1e11
"""Tokens times parameters that a model is asked for in all: about 20 seconds of one core, all evaluations together."""
Ids = npt.NDArray[np.int64]

PROSE = (
    "A checkpoint is a promise: that the model which was trained is the model which will be served. Every "
    "hand-over rewrites each tensor, and a mistake in the rewriting is silent, because a model with its keys "
    "and values exchanged in one layer of thirty still answers in whole sentences. It is only a little worse, "
    "and nobody can say why. In 1998 there were 3,141 ways to store a matrix; by 2026 there were 59,265 more, "
    "and each of them had its own idea of rows.",
    "The harbour master wrote the tide into the book at 04:37, closed it, and walked down to the quay. Two "
    "boats had come in during the night, one with cod and one with nothing. 'You might have turned back,' he "
    "said to the second. 'We might,' said the skipper, 'but then we should never have known that there was "
    "nothing there.' He thought about that for some time, and in the end he went back to his office and wrote "
    "it down beneath the tide, in pencil.",
)
"""Two texts of about a hundred tokens each, written for this probe. The third is `texts/jargon.txt`."""


@dataclass(frozen=True)
class Piece:
    """One sequence of a probe: tokens `start` to `stop` of row `row`."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a model is asked.

    Args:
        name: Of its checks, e.g. `prose`.
        tokens: `[b s]`.
        labels: `[b s]`: the token that follows each; `IGNORED` where none does, and then the loss there is 0.
        positions: `[b s]`: what RoPE rotates by; `None` is 0 to s - 1.
        segments: `[b s]`: which of the sequences in its row a token belongs to, counted from 1, and 0 for padding. A
            token sees earlier tokens of its own segment only. `None` is one segment a row.
        about: What is asked, for people.

    Raises:
        ValueError: Shapes differ; segments without positions, which have to say where each begins; a segment in two
            parts; a label at padding.
    """

    name: str
    tokens: Ids
    labels: Ids
    positions: Ids | None = None
    segments: Ids | None = None
    about: str = ""

    def __post_init__(self) -> None:
        shapes = {
            field: array.shape
            for field in ("tokens", "labels", "positions", "segments")
            if (array := getattr(self, field)) is not None
        }
        if len(set(shapes.values())) > 1 or self.tokens.ndim != 2:
            raise ValueError(f"the probe {self.name!r}: expected arrays [b s] of one shape, found {shapes}")
        if self.segments is None:
            return
        if self.positions is None:
            raise ValueError(f"the probe {self.name!r} has segments: give the positions too, where each begins anew")
        numbered = [(piece.row, self.segments[piece.row, piece.start]) for piece in self.pieces]
        if len(set(numbered)) < len(numbered):
            raise ValueError(f"the probe {self.name!r}: a segment must be in one part")
        if (self.labelled & ~self.compared).any():
            raise ValueError(f"the probe {self.name!r}: padding has labels; expected {IGNORED} there")

    @cached_property
    def compared(self) -> npt.NDArray[np.bool_]:
        """`[b s]`: the tokens whose answers mean something, all but padding."""
        return np.full(self.tokens.shape, True) if self.segments is None else np.asarray(self.segments > 0)

    @cached_property
    def labelled(self) -> npt.NDArray[np.bool_]:
        """`[b s]`: the tokens that have a loss."""
        return np.asarray(self.labels != IGNORED)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Its sequences, without padding."""
        rows, length = self.tokens.shape
        if self.segments is None:
            return tuple(Piece(row, 0, length) for row in range(rows))
        found = []
        for row, segments in enumerate(self.segments):
            seams = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), length]
            found += [Piece(row, start, stop) for start, stop in pairwise(seams) if segments[start] > 0]
        return tuple(found)

    def alone(self, piece: Piece) -> Probe:
        """The probe that asks for one of its sequences by itself, `[1 stop - start]`."""
        part = np.s_[piece.row : piece.row + 1, piece.start : piece.stop]
        return Probe(
            name=f"{self.name}, row {piece.row} from {piece.start}",
            tokens=self.tokens[part],
            labels=self.labels[part],
            positions=None if self.positions is None else self.positions[part],
        )


def probes(config: Mapping[str, Any], folder: Path, *, prose: bool) -> tuple[Probe, ...]:
    """Every probe for the model in `folder`, as long as `WORK` allows for a model of its size.

    Text where the weights are real, random ids where they are not.

    Args:
        config: Its config.
        folder: Holds `tokenizer.json` where `prose` is asked for.
        prose: Ask with text.
    """
    from parity.seeded import parameters

    affordable = int(WORK / parameters(dict(config)))
    vocab, furthest = int(config["vocab_size"]), int(config.get("max_position_embeddings", 2048))
    texts = _texts(folder) if prose else None
    random = np.random.default_rng(20)
    if texts is None:
        first = _rows("random ids", [random.integers(0, vocab, 97, dtype=np.int64) for _ in range(3)])
        stream, odd = np.split(random.integers(0, vocab, 2048, dtype=np.int64), 2)
    else:
        length = min(_within(affordable // 12, 32, 96), *(len(text) - 1 for text in texts))
        first = _rows("prose", [text[: length + 1] for text in texts])
        stream, odd = texts[-1][length + 1 :], texts[-1][-512:]  # the text ends with characters of many scripts
    return (
        first,
        _vocabulary(vocab, _within(affordable // 6, 64, 4096), random),
        _positions(odd, _within(affordable // 36, 16, 64), furthest),
        _long(stream, min(_within(affordable // 3, 64, 512), furthest)),
        _left_padded(odd, _within(affordable // 40, 12, 48)),
        _packed(odd, _within(affordable // 24, 24, 96)),
    )


def _within(value: int, least: int, most: int) -> int:
    return max(least, min(most, value))


def _texts(folder: Path) -> list[Ids] | None:
    """The three texts in the tokens of the model in `folder`; `None` where it has no tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    cited, _, jargon = (Path(__file__).parent / "texts" / "jargon.txt").read_text(encoding="utf-8").partition("\n\n")
    assert "Jargon File 4.4.7" in cited
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in (*PROSE, jargon)]
    return [np.array(text, dtype=np.int64) for text in ids]


def _rows(name: str, rows: list[Ids]) -> Probe:
    """One sequence a row; the last token of each is a label only."""
    ids = np.stack(rows)
    return Probe(name=name, tokens=ids[:, :-1], labels=ids[:, 1:], about=f"{len(rows)} x {ids.shape[1] - 1} tokens")


def _vocabulary(vocab: int, count: int, random: np.random.Generator) -> Probe:
    """Each row of the vocabulary once, in random order; of a large one a part, with both ends of ranks' shares."""
    if count < vocab:
        shares = [-(-vocab // tp) for tp in (2, 4, 8)]
        edges = {edge for share in shares for end in range(share, vocab, share) for edge in (end - 1, end)}
        spread = np.linspace(0, vocab - 1, count - len(edges), dtype=np.int64)
        asked = np.unique(np.concatenate([np.fromiter(edges, dtype=np.int64), spread]))
    else:
        asked = np.arange(vocab, dtype=np.int64)
    order = random.permutation(asked)
    rows = -(-len(order) // 128)
    ids = np.resize(order, (rows, -(-len(order) // rows)))  # begins anew where the last row is not full
    labels = np.append(ids.reshape(-1)[1:], order[0]).reshape(ids.shape)
    every = "" if len(asked) == vocab else f", about each {round(vocab / len(asked))}th"
    return Probe(
        name=f"vocabulary, {len(asked):,} of {vocab:,} rows",
        tokens=ids,
        labels=labels,
        about=f"each of {len(asked):,} vocabulary rows as a token and as a label{every}; all rows answer",
    )


def _positions(stream: Ids, length: int, furthest: int) -> Probe:
    """Near, then far; spread from 0 to the last position; and a run that ends at the last."""
    length = min(length, furthest)
    near = length // 2
    positions = np.stack(
        [
            np.concatenate([np.arange(near), np.arange(furthest - (length - near), furthest)]),
            np.linspace(0, furthest - 1, length, dtype=np.int64),
            np.arange(furthest - length, furthest),
        ]
    )
    rows = _cut(stream, [length + 1] * 3)
    return Probe(
        name=f"positions to {furthest - 1:,}",
        tokens=np.stack([row[:-1] for row in rows]),
        labels=np.stack([row[1:] for row in rows]),
        positions=positions.astype(np.int64),
        about="positions that jump from near to far, that are spread over the whole context, and that end it",
    )


def _long(stream: Ids, length: int) -> Probe:
    ids = np.resize(stream, length + 1)[None]
    return Probe(name=f"long, {length} tokens", tokens=ids[:, :-1], labels=ids[:, 1:], about="one long sequence")


def _left_padded(stream: Ids, length: int) -> Probe:
    """Sequences of four lengths, the shortest of one token, behind padding that is no special token."""
    lengths = (length, length * 3 // 4, length // 3, 1)
    return _assembled(
        "left padding",
        "sequences of four lengths behind padding",
        stream,
        [[(0, length - own), (1, own)] for own in lengths],
    )


def _packed(stream: Ids, length: int) -> Probe:
    """Several sequences a row, some of one token."""
    third = length // 3
    packs = ((length - third - 1, 1, third), (1, third, 1, 1, length - third - 3))
    return _assembled(
        "packed",
        "several sequences a row, some of one token",
        stream,
        [list(enumerate(pack, start=1)) for pack in packs],
    )


def _assembled(name: str, about: str, stream: Ids, rows: list[list[tuple[int, int]]]) -> Probe:
    """A probe of rows of (segment, length); segment 0 is padding, with tokens like any other."""
    parts = iter(_cut(stream, [length + 1 for row in rows for _, length in row]))
    made: dict[str, list[Ids]] = {"tokens": [], "labels": [], "positions": [], "segments": []}
    for segment, length in (part for row in rows for part in row):
        ids = next(parts)
        followed = np.arange(length) < (length - 1 if segment else 0)
        made["tokens"].append(ids[:-1])
        made["labels"].append(np.where(followed, ids[1:], IGNORED))
        made["positions"].append(np.arange(length) if segment else np.zeros(length, dtype=np.int64))
        made["segments"].append(np.full(length, segment))
    shape = (len(rows), -1)
    arrays = {field: np.concatenate(parts).astype(np.int64).reshape(shape) for field, parts in made.items()}
    compared = int((arrays["segments"] > 0).sum())
    told = f"{about}; {compared} of {arrays['tokens'].size} tokens are compared"
    return Probe(name=name, about=told, **arrays)


def _cut(stream: Ids, lengths: list[int]) -> list[Ids]:
    """Parts of `stream`, one behind the other, which begins anew where it ends."""
    return np.split(np.resize(stream, sum(lengths)), np.cumsum(lengths)[:-1].tolist())
