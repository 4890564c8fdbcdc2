"""Charts as inline SVG whose colours are CSS variables of the page, so that they follow its theme; no dependency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 340, 246
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 46
#: Colours and markers that the style sheet knows; further models start again.
COLOURS = 6


@dataclass(frozen=True)
class Point:
    """One point of a line; without bounds it has no band. ``note`` is shown when the pointer rests on it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One line with its band, in colour number ``colour``."""

    colour: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Ticks:
    """Where an axis has ticks, and the ends of its range."""

    low: float
    high: float
    marks: Sequence[tuple[float, str]]
    gap: float | None = None  # where the axis is broken


@dataclass
class _Canvas:
    """An SVG in the making; x and y are in data units."""

    x: Ticks
    y: Ticks
    parts: list[str] = field(default_factory=list)

    def px(self, value: float) -> float:
        return LEFT + (value - self.x.low) / (self.x.high - self.x.low) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y.low) / (self.y.high - self.y.low) * (HEIGHT - TOP - BOTTOM)

    def line(self, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
        self.parts.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def text(self, kind: str, x: float, y: float, words: str, anchor: str = "middle", turn: bool = False) -> None:
        rotate = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
        self.parts.append(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{rotate}>{escape(words)}</text>'
        )

    def axes(self, x_label: str, y_label: str) -> None:
        bottom, left = HEIGHT - BOTTOM, LEFT
        for value, words in self.y.marks:
            self.line("grid", left, self.py(value), WIDTH - RIGHT, self.py(value))
            self.text("tick", left - 6, self.py(value) + 3.5, words, "end")
        self.line("axis", left, bottom, WIDTH - RIGHT, bottom)
        for value, words in self.x.marks:
            self.line("axis", self.px(value), bottom, self.px(value), bottom + 4)
            self.text("tick", self.px(value), bottom + 16, words)
        if self.x.gap is not None:
            at = self.px(self.x.gap)
            self.parts.append(f'<rect class="paper" x="{at - 2:.1f}" y="{bottom - 3}" width="4" height="6"/>')
            for shift in (-2, 2):
                self.line("axis", at + shift - 1.5, bottom + 4, at + shift + 1.5, bottom - 4)
        self.text("label", (left + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label)
        self.text("label", 12, (TOP + bottom) / 2, y_label, turn=True)

    def path(self, points: Sequence[tuple[float, float]], kind: str, close: bool = False) -> None:
        steps = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
        self.parts.append(f'<{"polygon" if close else "polyline"} class="{kind}" points="{steps}"/>')

    def band(self, points: Sequence[Point], kind: str) -> None:
        bounds = [(p.x, p.low, p.high) for p in points if p.low is not None and p.high is not None]
        if len(bounds) > 1:
            self.path([(x, low) for x, low, _ in bounds] + [(x, high) for x, _, high in reversed(bounds)], kind, True)

    def marker(self, point: Point, colour: int) -> None:
        x, y = self.px(point.x), self.py(point.y)
        shape = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>',
            f'<rect x="{x - 2.9:.1f}" y="{y - 2.9:.1f}" width="5.8" height="5.8"/>',
            f'<path d="M{x:.1f} {y - 3.8:.1f}l3.8 6.6h-7.6z"/>',
            f'<path d="M{x:.1f} {y - 4.2:.1f}l4.2 4.2l-4.2 4.2l-4.2 -4.2z"/>',
            f'<path d="M{x:.1f} {y + 3.8:.1f}l3.8 -6.6h-7.6z"/>',
            f'<path d="M{x - 3:.1f} {y - 1:.1f}h2v-2h2v2h2v2h-2v2h-2v-2h-2z"/>',
        )[colour % COLOURS]
        self.parts.append(f'<g class="dot m{colour % COLOURS}">{shape}<title>{escape(point.note)}</title></g>')

    def svg(self, ident: str, title: str) -> str:
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{ident}">'
            f'<title id="{ident}">{escape(title)}</title>{"".join(self.parts)}</svg>'
        )


def swatch(colour: int) -> str:
    """A short line with the marker of a colour, for legends."""
    canvas = _Canvas(Ticks(0, 1, ()), Ticks(0, 1, ()))
    canvas.marker(Point(0.5, 0.5), colour)
    x, y = canvas.px(0.5), canvas.py(0.5)
    dot = canvas.parts[0].replace("<title></title>", "")
    return (
        f'<svg class="swatch" viewBox="{x - 14:.1f} {y - 6:.1f} 28 12" width="28" height="12" aria-hidden="true">'
        f'<line class="curve m{colour % COLOURS}" x1="{x - 13:.1f}" y1="{y:.1f}" x2="{x + 13:.1f}" y2="{y:.1f}"/>'
        f"{dot}</svg>"
    )


def nice(low: float, high: float, count: int = 5) -> Ticks:
    """Ticks at round numbers over at least ``low`` to ``high``."""
    span = max(high - low, 1e-9 * max(abs(high), 1.0), 1e-12)
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return Ticks(first * step, last * step, [(i * step, f"{i * step:g}") for i in range(first, last + 1)])


def unit_range() -> Ticks:
    """From 0 to 1, for Dice and shares."""
    return Ticks(0.0, 1.0, [(v / 5, f"{v / 5:.1f}") for v in range(6)])


class Budgets:
    """The eps axis: linear where the budgets are close to even, else logarithmic with 0 left of a break."""

    def __init__(self, eps: Sequence[float]) -> None:
        self.eps = sorted({e for e in eps if e > 0})
        self.log = len(self.eps) > 1 and self.eps[-1] > 6 * self.eps[0]
        if self.log:
            logs = [math.log(e) for e in self.eps]
            self._zero = logs[0] - max((logs[-1] - logs[0]) / (len(logs) - 1), 0.15 * (logs[-1] - logs[0]))
        else:
            self._zero = 0.0

    def at(self, eps: float) -> float:
        """Position of a budget."""
        if eps <= 0:
            return self._zero
        return math.log(eps) if self.log else eps

    def ticks(self) -> Ticks:
        """Ticks at 0 and the budgets, as many as can be read."""
        high = self.at(self.eps[-1]) if self.eps else 1.0
        span = (high - self._zero) or 1.0
        marks = [(self._zero, "0")]
        for eps in reversed(self.eps):
            far = all(abs(self.at(eps) - position) >= 0.11 * span for position, _ in marks)
            if far:
                marks.append((self.at(eps), f"{eps:g}"))
        gap = (self._zero + self.at(self.eps[0])) / 2 if self.log else None
        return Ticks(self._zero - 0.02 * span, high + 0.02 * span, sorted(marks), gap)


def curves(ident: str, title: str, lines: Sequence[Line], x: Ticks, y: Ticks, x_label: str, y_label: str) -> str:
    """Lines with bands and markers."""
    canvas = _Canvas(x, y)
    canvas.axes(x_label, y_label)
    for line in lines:
        canvas.band(line.points, f"band m{line.colour % COLOURS}")
    for line in lines:
        canvas.path([(p.x, p.y) for p in line.points], f"curve m{line.colour % COLOURS}")
        for point in line.points:
            canvas.marker(point, line.colour)
    return canvas.svg(ident, title)


def histogram(
    ident: str, title: str, values: Sequence[float], colour: int, x_label: str, y_label: str, bins: int = 24
) -> str:
    """Counts of ``values`` from 0 on, with their median as a line."""
    x = nice(0.0, max(values))
    width = x.high / bins
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, int(value / width)))] += 1
    y = nice(0.0, max(counts) * (1.12 if max(counts) > 5 else 1.0), min(5, max(counts)))
    canvas = _Canvas(x, y)
    canvas.axes(x_label, y_label)
    for i, count in enumerate(counts):
        if count:
            left, right, top = canvas.px(i * width) + 0.5, canvas.px((i + 1) * width) - 0.5, canvas.py(count)
            canvas.parts.append(
                f'<rect class="bar m{colour % COLOURS}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
                f'height="{canvas.py(0) - top:.1f}"><title>{count} cases from {i * width:.3g} to '
                f"{(i + 1) * width:.3g}</title></rect>"
            )
    ordered = sorted(values)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    canvas.line("rule", canvas.px(middle), TOP, canvas.px(middle), HEIGHT - BOTTOM)
    late = canvas.px(middle) > WIDTH / 2
    canvas.text(
        "tick", canvas.px(middle) + (-5 if late else 5), TOP + 9, f"median {middle:.3g}", "end" if late else "start"
    )
    return canvas.svg(ident, title)


def course(
    ident: str,
    title: str,
    bands: Sequence[Sequence[tuple[float, float, float]]],
    middle: Sequence[tuple[float, float]],
    colour: int,
    x_label: str,
    y_label: str,
    cap: float | None = None,
) -> str:
    """A line over nested bands of (x, low, high); ``cap`` is drawn where it is in sight."""
    top = max([y for _, y in middle] + [high for band in bands for _, _, high in band])
    shown = cap is not None and cap <= 1.6 * top
    xs = [x for x, _ in middle]
    y = nice(0.0, max(top, cap or 0.0) if shown else top)
    canvas = _Canvas(nice(min(xs), max(xs)), y)
    canvas.axes(x_label, y_label)
    for band in bands:
        canvas.band([Point(x, low, low, high) for x, low, high in band], f"band m{colour % COLOURS}")
    canvas.path(middle, f"curve m{colour % COLOURS}")
    if shown and cap is not None:
        canvas.line("rule", LEFT, canvas.py(cap), WIDTH - RIGHT, canvas.py(cap))
        canvas.text("tick", LEFT + 5, canvas.py(cap) + (11 if cap >= 0.95 * y.high else -4), f"cap {cap:.3g}", "start")
    return canvas.svg(ident, title)
