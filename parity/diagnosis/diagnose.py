"""From wrong tensors to the wrong plan that made them.

Both directions look alike in Hugging Face's space: tensors that should be `expected` and are `actual`. (What an import
made of them is pulled back there first, see `pullback`.) Each wrong tensor is explained by itself; what the tensors of
a layer have in common, and what layers have in common, is then said once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.topology import Topology
from parity.causes import Cause, short, shorts
from parity.diagnosis.provenance import Bools, Coded, Floats, Ints, Matched, Numbering, Origins, Tensors, bits, matrix
from parity.diagnosis.readings import FUSED, exchanged, joint_reading, reading, shards_of, shift_of
from parity.diagnosis.verdicts import Trace, merged

_STANDS_FOR_ITSELF = 0.9  # of a tensor's wrong elements: what is said of it then is said of the tensor
VOCABULARY = ("embed_tokens", "lm_head")


def diagnose(
    expected: Tensors,
    actual: Tensors,
    config: Mapping[str, Any],
    topology: Topology,
    *,
    table: Mapping[str, tuple[int, ...]] | None = None,
    homes: Mapping[str, str] | None = None,
) -> list[Cause]:
    """What explains the differences, most telling first; empty where there are none.

    Args:
        expected: What the tensors should hold.
        actual: What they hold.
        config: The HF config.
        topology: The parallel layout, for shards and stages.
        table: Where `expected` is a coded checkpoint in float32, its tensors in the order of their codes.
        homes: For a tensor that is a copy of another (a tied head) that other one.
    """
    homes = homes or {}
    shapes = {key: tuple(expected[key].shape) for key in expected if key not in homes}
    numbering = Numbering(dict(table) if table else shapes)
    origins: Origins = Coded(numbering) if table else Matched(numbering, expected)
    traces = [
        Trace(keys=(key,), kind=kind, elements=side[key].size)
        for kind, side, other in (("missing tensors", expected, actual), ("extra tensors", actual, expected))
        for key in side
        if key not in other
    ]
    tensors: dict[str, _Tensor] = {}
    for key in expected:
        if key not in actual:
            continue
        right, found = expected[key], actual[key]
        if right.shape != found.shape:
            traces.append(_misshapen(key, right, found))
        elif not np.array_equal(bits(right), bits(found)):
            start = numbering.starts[homes.get(key, key)]
            # Made again when it is asked for: wrong tensors are not kept.
            tensors[key] = _Tensor(key, expected, actual, start, numbering, origins, topology.tp)
    for names in FUSED:
        fused = _fused(names, tensors, numbering, config, topology.tp)
        traces += fused
        tensors = {key: tensor for key, tensor in tensors.items() if not any(key in trace.keys for trace in fused)}
    for tensor in tensors.values():
        traces += tensor.traces(config)
    return merged(traces, numbering.table)


@dataclass(frozen=True)
class _Tensor:
    """One wrong tensor, as a matrix."""

    key: str
    expected: Tensors
    actual: Tensors
    start: int
    numbering: Numbering
    origins: Origins
    tp: int

    def sides(self) -> tuple[Floats, Floats]:
        """What it should hold, and what it holds."""
        return matrix(self.expected[self.key]), matrix(self.actual[self.key])

    def row_sources(self) -> tuple[Ints, Bools]:
        """The source of every row, and which rows are wrong."""
        right, found = self.sides()
        lines = (bits(right) != bits(found)).any(axis=1)
        sources = self.start + np.arange(len(right)) * right.shape[1]
        sources[lines] = self.origins.rows(self.key, found, lines)
        return sources, lines

    def traces(self, config: Mapping[str, Any]) -> list[Trace]:
        """Explanations of its wrong elements, those that nothing explains included."""
        right, found = self.sides()
        wrong = bits(right) != bits(found)
        out: list[Trace] = []
        # Numbers that were computed come first: a rounded code may be the code of something else, or infinite.
        kind, detail = _computed(right, found, wrong)
        if kind:
            return [self._trace(kind, wrong, detail=detail)]
        for kind, mask in (("not numbers", ~np.isfinite(found)), ("zeros", _zero_lines(found, wrong))):
            if (mask & wrong).any():
                out.append(self._trace(kind, mask & wrong, _part(mask & wrong, self.tp)))
                wrong &= ~mask
        if not wrong.any():
            return out
        if min(right.shape) > 1 and np.array_equal(bits(right.T).ravel(), bits(found).ravel()):
            return [*out, self._trace("transposed", wrong)]
        held = bits(right) == bits(found)
        for along in ("rows", "columns"):
            if wrong.any() and not (along == "columns" and wrong.shape[1] == 1):
                out += self._lines(along, found, wrong, held, config)
        kinds = {trace.kind for trace in out}
        if "rows shifted" in kinds or ("rows permuted" in kinds and short(self.key) in VOCABULARY):
            out = [trace for trace in out if trace.kind != "zeros"]  # padding that came in from beyond the edge
        if wrong.any():
            gone = not found[wrong].any()  # single elements, of no row or column
            out.append(
                self._trace("zeros", wrong, _part(wrong, self.tp)) if gone else self._unexplained(right, found, wrong)
            )
        return out

    def _trace(self, kind: str, mask: Bools, part: str = "", detail: str = "", source: str = "") -> Trace:
        return Trace(keys=(self.key,), kind=kind, elements=int(mask.sum()), part=part, detail=detail, source=source)

    def _lines(self, along: str, found: Floats, wrong: Bools, held: Bools, config: Mapping[str, Any]) -> list[Trace]:
        """What moved into its rows or columns, whole; explained elements are cleared in `wrong`."""
        axis = ("rows", "columns").index(along)
        lines: Bools = np.asarray(wrong.any(axis=1 - axis))
        step = wrong.shape[1] if axis == 0 else 1
        places = np.arange(wrong.shape[axis]) * step
        sources = self.start + places
        sources[lines] = getattr(self.origins, along)(self.key, found, lines)
        if wrong.shape[1] == 1 and (sources[lines] >= 0).mean() < 0.5:
            return []  # single elements, and codes by chance
        out: list[Trace] = []

        def keep(kind: str, mask: Bools, detail: str = "", source: str = "", part: bool = False) -> None:
            where: Bools = wrong & (mask[:, None] if axis == 0 else mask[None])
            out.append(self._trace(kind, where, _part(where, self.tp) if part else "", detail, source))
            np.copyto(wrong, False, where=where)
            lines[mask] = False

        home = self.numbering.key_of(self.start)
        for key in self.numbering.keys_in(sources[lines]):
            here = lines & (sources == self.numbering.starts[key] + places)
            if key != home and here.any():
                whole = self.expected[key].size == found.size and bool((matrix(self.expected[key]) == found).all())
                keep("moved", here, source=key, part=not whole)
        inside = lines & (sources >= self.start) & (sources < self.start + wrong.size)
        if inside.any():
            order = np.where(inside | held.all(axis=1 - axis), (sources - self.start) // step, -1)
            order[(order < 0) | (order >= len(order))] = -1
            pair, shift = exchanged(order), None if shards_of(order, self.tp) else shift_of(order)
            if pair is not None and axis == 0:
                keep("rows exchanged", inside, f"{pair[0]} and {pair[1]}")
            elif shift is not None and axis == 0:
                keep("rows shifted", inside, f"by {shift:+d}")
            else:
                keep(f"{along} permuted", inside, reading(short(self.key), along, order, config, self.tp))
        rest = lines & (sources >= 0)
        if rest.any() and axis == 0:
            names = ", ".join(shorts(self.numbering.keys_in(sources[rest]))[:4])
            keep("rows permuted", rest, f"rows of {names} in other places")
        return out

    def _unexplained(self, right: Floats, found: Floats, wrong: Bools) -> Trace:
        count = int(wrong.sum())
        if count >= _STANDS_FOR_ITSELF * wrong.size and wrong.size > 1 and not _alike(right, found):
            return self._trace("initial values", wrong)
        row, column = (int(n) for n in np.argwhere(wrong)[0])
        at = [row, column] if wrong.shape[1] > 1 else [row]
        said = f"the first, {at}, is {float(found[row, column])!r} and should be {float(right[row, column])!r}"
        return self._trace("unexplained", wrong, detail=said)


def _fused(
    names: tuple[str, ...],
    tensors: Mapping[str, _Tensor],
    numbering: Numbering,
    config: Mapping[str, Any],
    tp: int,
) -> list[Trace]:
    """Rows astray within a matrix that Megatron-Core holds fused, layer by layer."""
    out: list[Trace] = []
    first = names[0]
    for key in numbering.table:
        if short(key).removesuffix(".bias") != first:
            continue
        keys = tuple(key.replace(f".{first}.", f".{name}.") for name in names)
        wrong = [name for name in keys if name in tensors]
        if len(wrong) < 2:
            continue
        orders, strayed, elements = list[Ints](), False, 0
        base = 0
        bases = {}
        for name in keys:
            bases[name] = base
            base += numbering.table[name][0]
        for name in keys:
            shape, start = numbering.table[name], numbering.starts[name]
            columns = 1 if len(shape) == 1 else shape[1]
            places = np.arange(shape[0])
            sources, lines = (start + places * columns, np.zeros(shape[0], dtype=bool))
            if name in tensors:
                sources, lines = tensors[name].row_sources()
                elements += int(lines.sum()) * columns
            order = np.full(shape[0], -1, dtype=np.int64)
            for other in keys:
                begin = numbering.starts[other]
                inside = (sources >= begin) & (sources < begin + numbering.table[other][0] * columns)
                order[inside] = bases[other] + (sources[inside] - begin) // columns
                # Rows of another tensor, not in their places there: neither an exchange nor an order of its own.
                strayed |= bool(other != name and ((sources - begin) // columns != places)[inside & lines].any())
            orders.append(order)
        joint = np.concatenate(orders)
        if strayed and (joint >= 0).mean() > 0.5 and (detail := joint_reading(names, joint, config, tp)):
            out.append(Trace(keys=tuple(wrong), kind="rows permuted", elements=elements, detail=detail))
    return out


def _computed(right: Floats, found: Floats, wrong: Bools) -> tuple[str, str]:
    """What arithmetic on the right values gives all the wrong ones, as kind and detail; empty for none."""
    if (found[wrong] == 1).all() and (found == 1).all():
        return "ones", ""
    exact, said = right[wrong], found[wrong]
    if not said.any():
        return "", ""  # zeros, whatever they might be computed from
    pattern, other = bits(exact), bits(said)
    if np.array_equal(_to_bf16(pattern), other):
        return "rounded", "to bfloat16"
    if np.array_equal(pattern & np.uint32(0xFFFF0000), other):
        return "truncated", "to bfloat16"
    if len(exact) > 1 and np.array_equal(exact.view(np.int32).astype(np.float32), said):
        return "dtype", "the bytes of float32, read as int32"
    with np.errstate(over="ignore", invalid="ignore"):
        if np.array_equal(exact.astype(np.float16).astype(np.float32), said):
            return "rounded", "to float16"
        if len(exact) < 2:
            return "", ""
        for by in (np.float32(-1), np.float32(1)):
            added = exact + by
            if np.array_equal(added, said) or np.array_equal(_to_bf16(bits(added)), other):
                return "offset", f"by {by:+g}, as zero-centred weights are"
        if len(exact) >= _STANDS_FOR_ITSELF * wrong.size:
            by = np.float32(np.median(said.astype(np.float64) - exact.astype(np.float64)))
            if by and np.array_equal(exact + by, said):
                return "offset", f"by {by:+g}"
    return "", ""


def _to_bf16(pattern: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Float32 bit patterns rounded to the nearest bfloat16, ties to even."""
    rounded = pattern + np.uint32(0x7FFF) + (pattern >> np.uint32(16) & np.uint32(1))
    return rounded & np.uint32(0xFFFF0000)


def _alike(right: Floats, found: Floats) -> bool:
    """Whether wrong values are the right ones with an error, rather than others: more than half correlated."""
    known = np.isfinite(found) & np.isfinite(right)
    left, other = (side[known].astype(np.float64) for side in (right, found))
    if not left.size:
        return False
    left, other = left - left.mean(), other - other.mean()
    norm = float(np.sqrt((left**2).sum() * (other**2).sum()))
    return norm > 0 and float((left * other).sum()) / norm > 0.5


def _zero_lines(found: Floats, wrong: Bools) -> Bools:
    """Rows and columns of zeros; of a vector its zeros, where they are most of what is wrong."""
    zero: Bools = found == 0
    if found.shape[1] == 1:
        return zero if 2 * int((zero & wrong).sum()) >= int(wrong.sum()) else np.zeros_like(zero)
    return np.asarray(zero & (zero.all(axis=1, keepdims=True) | zero.all(axis=0, keepdims=True)))


def _misshapen(key: str, right: Floats, found: Floats) -> Trace:
    detail = f"expected {list(right.shape)}, found {list(found.shape)}"
    kind = "shape"
    if right.ndim == 2 and found.shape == right.shape[::-1] and np.array_equal(bits(right.T), bits(found)):
        kind = "transposed"
    elif short(key) in VOCABULARY and right.shape[1:] == found.shape[1:]:
        rows, more = min(len(right), len(found)), len(found) - len(right)
        if np.array_equal(bits(right[:rows]), bits(found[:rows])):
            kind = "padding"
            detail = (f"{more} rows kept or added" if more > 0 else f"{-more} rows too many stripped") + f": {detail}"
    return Trace(keys=(key,), kind=kind, elements=right.size, detail=detail)


def _part(mask: Bools, tp: int) -> str:
    """Which rows or columns of a matrix are meant, unless it is all of them."""
    texts = []
    for name, axis in (("row", 0), ("column", 1)):
        size, hit = mask.shape[axis], np.flatnonzero(mask.any(axis=1 - axis))
        if len(hit) == size or not len(hit):
            continue
        first, last = int(hit[0]), int(hit[-1])
        if last - first + 1 != len(hit):
            texts.append(f"{len(hit):,} of {size:,} {name}s")
            continue
        share = -(-size // tp)
        shard = f" (tp rank {first // share}'s part)"
        exact = tp > 1 and first % share == 0 and last == min(first + share, size) - 1
        texts.append((f"{name} {first}" if first == last else f"{name}s {first}-{last}") + shard * exact)
    return ", ".join(texts)
