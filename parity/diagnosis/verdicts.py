"""What single wrong tensors have in common, said once: from traces to causes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from parity.causes import Cause, short, shorts

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A part of one tensor, or of fused ones, and what explains it.

    Args:
        keys: The tensors.
        kind: Of the cause; `moved` for elements that are in their places, but in another tensor's.
        elements: How many wrong elements it explains.
        part: Which rows or columns, where it is not all of them.
        detail: How.
        source: The tensor that moved elements are from.
    """

    keys: tuple[str, ...]
    kind: str
    elements: int
    part: str = ""
    detail: str = ""
    source: str = ""


Ranked = tuple[int, Cause]


def merged(traces: Sequence[Trace], table: Mapping[str, object]) -> list[Cause]:
    """One cause for all tensors and layers that show it; those that explain most come first, the unexplained last.

    Args:
        traces: Of the wrong tensors.
        table: The keys of the model.
    """
    moved = [trace for trace in traces if trace.kind == "moved"]
    ranked = _exchanges(moved) + _layers_moved(moved, table)
    ranked += _alike([trace for trace in traces if trace.kind != "moved"])
    ranked.sort(key=lambda pair: (pair[1].kind == "unexplained", -pair[0], pair[1].kind, pair[1].what))
    return [cause for _, cause in ranked]


def _alike(traces: Iterable[Trace]) -> list[Ranked]:
    """Traces of one kind, part and detail; then names whose layers are the same."""
    groups: dict[tuple[str, str, str], dict[tuple[str, ...], list[Trace]]] = {}
    for trace in traces:
        detail = "" if trace.kind == "unexplained" else trace.detail
        group = groups.setdefault((trace.kind, trace.part, detail), defaultdict(list))
        group[shorts(trace.keys)].append(trace)
    out: list[Ranked] = []
    for (kind, part, detail), named in groups.items():
        by_layers: dict[tuple[int, ...], list[tuple[str, ...]]] = defaultdict(list)
        for names, members in named.items():
            by_layers[_layers(trace.keys[0] for trace in members)].append(names)
        for layers, together in by_layers.items():
            members = [trace for names in together for trace in named[names]]
            elements = sum(trace.elements for trace in members)
            said = detail
            if kind == "unexplained":
                said = f"{elements:,} further element{'s' * (elements != 1)} unexplained; {members[0].detail}"
            what = shorts(name for names in together for name in names)
            cause = Cause(kind=kind, what=what, where=_where(part, layers), detail=said)
            out.append((elements, cause))
    return out


def _exchanges(moved: Iterable[Trace]) -> list[Ranked]:
    """Tensors that hold another name's elements: in a circle, exchanged; otherwise a second copy."""
    by_layer: dict[int | None, list[tuple[str, str, Trace]]] = defaultdict(list)
    for trace in moved:
        name, source = short(trace.keys[0]), short(trace.source)
        if name != source:
            by_layer[_layer(trace.keys[0])].append((name, source, trace))
    groups: dict[tuple[str, tuple[str, ...], str], list[Trace]] = defaultdict(list)
    for edges in by_layer.values():
        from_ = {(name, trace.part): source for name, source, trace in edges}
        for name, source, trace in edges:
            circle, at = [name], source
            while at != name and at not in circle and (at, trace.part) in from_:
                circle.append(at)
                at = from_[at, trace.part]
            if at == name:
                groups["keys exchanged", tuple(sorted(circle)), trace.part].append(trace)
            else:
                groups["duplicated", (name, source), trace.part].append(trace)
    out: list[Ranked] = []
    for (kind, names, part), members in groups.items():
        plain = tuple(name.removesuffix(".bias") for name in names)
        if plain != names and (kind, plain, part) in groups:
            continue  # the biases went with their weights
        layers = _layers(trace.keys[0] for trace in members)
        cause = Cause(kind=kind, what=names, where=_where(part, layers))
        out.append((sum(trace.elements for trace in members), cause))
    return out


def _layers_moved(moved: Iterable[Trace], table: Mapping[str, object]) -> list[Ranked]:
    """Layers that hold another layer's elements, all names with the same map together."""
    maps: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    elements: dict[tuple[str, str], int] = defaultdict(int)
    for trace in moved:
        here, there = _layer(trace.keys[0]), _layer(trace.source)
        if here is not None and there is not None and here != there:
            maps[short(trace.keys[0]), trace.part][here] = there
            elements[short(trace.keys[0]), trace.part] += trace.elements
    groups: dict[tuple[str, tuple[tuple[int, int], ...]], list[str]] = defaultdict(list)
    for (name, part), found in maps.items():
        groups[part, tuple(sorted(found.items()))].append(name)
    every = {short(key) for key in table if _layer(key) is not None}
    count = len({_layer(key) for key in table} - {None})
    out: list[Ranked] = []
    for (part, found_), names in groups.items():
        what = () if set(names) == every else shorts(names)
        size = sum(elements[name, part] for name in names)
        where = _where(part, tuple(layer for layer, _ in found_))
        out.append((size, Cause(kind="layers moved", what=what, where=where, detail=_map_text(dict(found_), count))))
    return out


def _map_text(found: Mapping[int, int], count: int) -> str:
    """Which layer each layer holds."""
    steps = {(there - here) % count for here, there in found.items()}
    pairs = [here for here, there in found.items() if here < there and found.get(there) == here]
    if len(found) == 2 and pairs:
        return f"layers {pairs[0]} and {found[pairs[0]]} are exchanged"
    if len(found) > 2 and all(there == count - 1 - here for here, there in found.items()):
        return "in reverse order"
    runs: list[list[int]] = []
    for here in sorted(found):
        if runs and here == runs[-1][1] + 1 and found[here] - here == found[runs[-1][0]] - runs[-1][0]:
            runs[-1][1] = here
        else:
            runs.append([here, here])
    texts = [f"{_span(first, last)} holds {_span(found[first], found[last])}" for first, last in runs]
    shift = ""
    if len(steps) == 1 and len(found) > 2:
        step = steps.pop()
        shift = f"shifted by {step if 2 * step <= count else step - count:+d}: "
    twice = sorted({there for there in found.values() if there not in found})
    copied = f"; layer {', '.join(map(str, twice))} is there twice" * bool(twice)
    return shift + ", ".join(texts) + copied


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _where(part: str, layers: tuple[int, ...]) -> str:
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    spans = ", ".join(_span(*run) for run in runs)
    text = f"layer{'s' * (len(layers) > 1)} {spans}" if layers else ""
    return " of ".join(said for said in (part, text) if said)


def _layers(keys: Iterable[str]) -> tuple[int, ...]:
    return tuple(sorted({layer for key in keys if (layer := _layer(key)) is not None}))


def _layer(key: str) -> int | None:
    found = _LAYER.match(key)
    return int(found[1]) if found else None
