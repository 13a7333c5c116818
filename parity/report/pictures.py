"""Pictures as inline SVG: curves against level lines, and maps; colours are CSS classes, which follow the theme."""

from __future__ import annotations

import base64
import itertools
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from parity.findings import quantity

POINTS = 400
"""A longer curve shows the largest value of each of so many equal parts."""
CELLS = 96
"""A larger map shows the largest value of each of so many equal parts, in each direction."""
NAMED = 1024
"""Up to so many cells are drawn one by one, each with its value under the pointer."""
WIDTH, HEIGHT = 540, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 40


def picture(fields: Mapping[str, Any]) -> Markup:
    """One picture of a run record; text in place of one that has nothing to show."""
    drawn = _lines(fields) if fields["kind"] == "lines" else _map(fields)
    return drawn or Markup('<p class="quiet">nothing to draw: no value is a number</p>')


def number(value: object) -> float:
    """A number of a run record: NaN and infinity are text there, and anything else that is no number is NaN."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def pooled(values: Sequence[float], parts: int) -> list[float]:
    """The largest value of each of at most `parts` equal parts; NaN where one has no finite value."""
    if len(values) <= parts:
        return list(values)
    edges = [round(index * len(values) / parts) for index in range(parts + 1)]
    return [_largest(values[start:stop]) for start, stop in itertools.pairwise(edges)]


def _largest(values: Sequence[float]) -> float:
    return max((value for value in values if math.isfinite(value)), default=math.nan)


def _lines(fields: Mapping[str, Any]) -> Markup | None:
    curves = {name: [number(value) for value in values] for name, values in fields["curves"].items()}
    marks = {name: number(value) for name, value in fields.get("marks", {}).items()}
    marks = {name: value for name, value in marks.items() if math.isfinite(value)}
    finite = [v for values in [*curves.values(), [*marks.values()]] for v in values if math.isfinite(v)]
    log = bool(fields.get("log", True)) and any(value > 0 for value in finite)
    shown = [value for value in finite if value > 0] if log else finite
    if not any(math.isfinite(value) for values in curves.values() for value in values) or not shown:
        return None
    low, high, steps = _scale(min(shown), max(shown), log)
    length = max(map(len, curves.values()))

    def across(index: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (index / (length - 1) if length > 1 else 0.5)

    def down(value: float) -> float:
        if log:
            value = math.log10(value) if value > 0 else low
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (min(max(value, low), high) - low) / (high - low)

    parts = []
    for step in steps:
        at = down(10**step if log else step)
        text = ("0" if step == low and 0 in finite else f"1e{step:.0f}") if log else quantity(float(step))
        parts.append(f'<path class="rule" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{at + 3.5:.1f}">{text}</text>')
    parts += _across_ticks(fields.get("ticks") or (), length, across)
    for index, (name, value) in enumerate(marks.items()):
        kind = name if name in ("floor", "gate") else "other"
        above = down(value) - 4 if down(value) > TOP + 10 else down(value) + 11
        parts.append(f'<path class="mark {kind}" d="M{LEFT} {down(value):.1f}H{WIDTH - RIGHT}"/>')
        label = escape(f"{name} {quantity(value)}")
        at = WIDTH - RIGHT - 4 - 150 * (index // 2)
        parts.append(f'<text class="tick mark-{kind}" text-anchor="end" x="{at}" y="{above:.1f}">{label}</text>')
    for index, values in enumerate(curves.values()):
        parts += _curve(values, index % 6, across, down)
    keys = Markup("").join(
        Markup('<span class="key c{}">{}</span>').format(index % 6, name) for index, name in enumerate(curves)
    )
    svg = _svg(WIDTH, HEIGHT, Markup("".join(parts)), fields)
    return Markup('{}<div class="keys">{}</div>').format(svg, keys) if len(curves) > 1 else svg


def _curve(values: Sequence[float], colour: int, across: Any, down: Any) -> Iterator[str]:
    """Strokes between neighbouring numbers, gaps where there is none, dots where points are few."""
    points = pooled(values, POINTS)
    stride = (len(values) - 1) / (len(points) - 1) if len(points) > 1 else 0.0
    path, pen = "", False
    for index, value in enumerate(points):
        if not math.isfinite(value):
            pen = False
            continue
        path += f"{'L' if pen else 'M'}{across(index * stride):.1f} {down(value):.1f}"
        pen = True
    yield f'<path class="curve s{colour}" d="{path}"/>'
    if len(points) <= 40:
        for index, value in enumerate(points):
            if math.isfinite(value):
                at = f'cx="{across(index * stride):.1f}" cy="{down(value):.1f}"'
                yield f'<circle class="f{colour}" r="2.6" {at}><title>{index}: {quantity(value)}</title></circle>'


def _across_ticks(ticks: Sequence[str], length: int, across: Any) -> Iterator[str]:
    widest = max((len(str(tick)) for tick in ticks), default=5)
    room = max(2, int((WIDTH - LEFT - RIGHT) / (6.2 * min(widest, 16) + 14)))
    every = max(1, math.ceil(length / room))
    if not ticks:
        decade = 10 ** math.floor(math.log10(every))
        every = next(decade * factor for factor in (1, 2, 5, 10) if decade * factor >= every)
    for index in range(0, length, every):
        name = str(ticks[index]) if index < len(ticks) else str(index)
        short = escape(name if len(name) <= 16 else name[:15] + "…")
        x, y = f"{across(index):.1f}", HEIGHT - BOTTOM + 15
        title = f"<title>{escape(name)}</title>"
        yield f'<text class="tick" text-anchor="middle" x="{x}" y="{y}">{short}{title}</text>'


def _scale(low: float, high: float, log: bool) -> tuple[float, float, list[float]]:
    """Ends of an axis, and where it is ruled; decimal logarithms if `log`."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        last = max(last, first + 1)
        return first, last, [float(at) for at in range(first, last + 1, max(1, math.ceil((last - first) / 6)))]
    low, high = (low, high) if high > low else (low - abs(low or 1) / 2, high + abs(high or 1) / 2)
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return first * step, last * step, [at * step for at in range(first, last + 1)]


def _map(fields: Mapping[str, Any]) -> Markup | None:
    rows = [[number(value) for value in row] for row in fields["values"]]
    finite = [value for row in rows for value in row if math.isfinite(value)]
    width = max(map(len, rows), default=0)
    if not width:
        return None
    rows = [row + [math.nan] * (width - len(row)) for row in rows]
    size = f"{len(rows)} x {width}"
    names = (list(map(str, fields.get("rows") or ())), list(map(str, fields.get("columns") or ())))
    cells = _pooled_rows(rows)
    log = bool(fields.get("log", True)) and any(value > 0 for value in finite)
    shown = [value for value in finite if value > 0] if log else finite
    low, high = (min(shown), max(shown)) if shown else (0.0, 0.0)
    low = low if log else min(low, 0.0)
    shades = [[_shade(value, low, high, log) for value in row] for row in cells]
    across = min(36.0, max(4.0, 520 / len(cells[0])))
    tall = min(across, 26.0, max(2.0, 420 / len(cells)))
    left = 12 + (min(max(map(len, names[0])), 34) * 6.2 if names[0] else 26)
    wide, high_px = across * len(cells[0]), tall * len(cells)
    parts: list[str] = []
    if len(cells) * len(cells[0]) <= NAMED:
        parts += _rectangles(cells, shades, names, left, across, tall)
    else:
        image = f'<image href="data:image/png;base64,{_png(shades)}" x="{left:.0f}" y="4" width="{wide:.1f}" '
        parts.append(image + f'height="{high_px:.1f}" preserveAspectRatio="none" class="pixels"/>')
    parts.append(f'<rect class="frame" x="{left:.0f}" y="4" width="{wide:.1f}" height="{high_px:.1f}"/>')
    if names[0] and len(names[0]) == len(cells):
        for index in range(0, len(cells), max(1, math.ceil(11 / tall))):
            y = 4 + tall * (index + 0.5) + 3.5
            parts.append(f'<text class="tick" text-anchor="end" x="{left - 6:.0f}" y="{y:.1f}">')
            parts.append(f"{escape(names[0][index][:34])}</text>")
    else:
        parts.append(f'<text class="tick" text-anchor="end" x="{left - 6:.0f}" y="14">0</text>')
        parts.append(
            f'<text class="tick" text-anchor="end" x="{left - 6:.0f}" y="{high_px + 3:.1f}">{len(rows)}</text>'
        )
    below = high_px + 4
    if names[1] and len(names[1]) == len(cells[0]):
        longest = min(max(map(len, names[1])), 28)
        for index in range(0, len(cells[0]), max(1, math.ceil(12 / across))):
            x = left + across * (index + 0.5) + 3
            turn = f'transform="rotate(-50 {x:.1f} {below + 12:.0f})"'
            parts.append(f'<text class="tick" text-anchor="end" x="{x:.1f}" y="{below + 12:.0f}" {turn}>')
            parts.append(f"{escape(names[1][index][:28])}</text>")
        below += 14 + longest * 4.8
    else:
        parts.append(f'<text class="tick" x="{left:.0f}" y="{below + 14:.0f}">0</text>')
        parts.append(f'<text class="tick" text-anchor="end" x="{left + wide:.0f}" y="{below + 14:.0f}">{width}</text>')
        below += 20
    svg = _svg(max(left + wide + 8, 260), below, Markup("".join(parts)), fields, axes=False)
    unit = fields.get("unit", "")
    scale = Markup('<span class="ramp"></span> {} … {} {}').format(quantity(low), quantity(high), unit)
    broken = len(rows) * width - len(finite)
    extra = Markup(' <span class="bad-key">{} not numbers</span>').format(f"{broken:,}") if broken else ""
    kind = " (log)" if log else ""
    axes = Markup("{} by {}, {}").format(fields["y"], fields["x"], size)
    return Markup('{}<div class="keys">{}; {}{}{}</div>').format(svg, axes, scale, kind, extra)


def _pooled_rows(rows: list[list[float]]) -> list[list[float]]:
    narrow = [pooled(row, CELLS) for row in rows]
    columns = [pooled(column, CELLS) for column in zip(*narrow, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def _rectangles(
    cells: list[list[float]],
    shades: list[list[int | None]],
    names: tuple[list[str], list[str]],
    left: float,
    across: float,
    tall: float,
) -> Iterator[str]:
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            shade = shades[y][x]
            colour = 'class="bad"' if shade is None else f'class="cell" fill-opacity="{shade / 255:.2f}"'
            place = f"{names[0][y] if y < len(names[0]) else y}, {names[1][x] if x < len(names[1]) else x}"
            box = f'x="{left + across * x:.1f}" y="{4 + tall * y:.1f}" width="{across:.1f}" height="{tall:.1f}"'
            yield f"<rect {colour} {box}><title>{escape(place)}: {quantity(value)}</title></rect>"


def _shade(value: float, low: float, high: float, log: bool) -> int | None:
    """From 0 (nothing) to 255; `None` for what is no number."""
    if not math.isfinite(value):
        return None
    if value <= 0 if log else high == low or value == low == 0:
        return 0
    if high == low:
        return 255
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    share = (value / 2 - low / 2) / (high / 2 - low / 2)  # halves: the range itself may be too large for a float
    return round(255 * (0.12 + 0.88 * min(max(share, 0.0), 1.0)))


def _png(shades: list[list[int | None]]) -> str:
    """Cells as a PNG of one hue whose opacity is the value, in base64."""
    ink, bad = bytes((217, 72, 15)), bytes((190, 24, 190, 255))
    lines = [b"\0" + b"".join(bad if shade is None else ink + bytes((shade,)) for shade in row) for row in shades]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", len(shades[0]), len(shades), 8, 6, 0, 0, 0)
    image = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"".join(lines), 9)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + image).decode()


def _svg(width: float, height: float, inner: Markup, fields: Mapping[str, Any], *, axes: bool = True) -> Markup:
    names = Markup("")
    if axes:
        names = Markup(
            '<text class="axis" text-anchor="middle" x="{}" y="{}">{}</text>'
            '<text class="axis" text-anchor="middle" transform="translate(13 {}) rotate(-90)">{}</text>'
        ).format((LEFT + width - RIGHT) / 2, height - 6, fields["x"], (height - BOTTOM + TOP) / 2, fields["y"])
    box = Markup('<svg viewBox="0 0 {:.0f} {:.0f}" style="max-width:{:.0f}px" role="img" aria-label="{}">')
    return box.format(width, height, width, fields["title"]) + inner + names + Markup("</svg>")
