"""Charts as inline SVG, drawn by matplotlib; their colours are CSS variables of the page and follow its theme.

Less code than a drawing of our own; 20 charts take a second and 0.2 MB.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from statistics import median
from typing import Any

from ima_seg.evaluate.measure.statistics import Estimate

WIDTH, HEIGHT = 340, 246
#: Colours and markers that the style sheet knows; further models start again.
COLOURS = 6

#: Stand for CSS variables, which matplotlib does not know, until the SVG is written.
_VARIABLES = {f"#0000{i:02x}": name for i, name in enumerate(("ink", "muted", "grid", "paper"), 1)}
_INK, _MUTED, _GRID, _PAPER = _VARIABLES
_MODEL = [f"#0001{i:02x}" for i in range(COLOURS)]
_VARIABLES |= {colour: f"m{i}" for i, colour in enumerate(_MODEL)}
_MARKERS = "os^DvP"
_DASHES = ("-", (0, (4, 1.4)), (0, (1.1, 1.4)), (0, (5, 1.7, 1.1, 1.7)), (0, (2.2, 1.1)), (0, (6.7, 1.7)))
_STYLE = {
    "font.size": 11,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "axes.labelcolor": _INK,
    **dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor"), _MUTED),
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top"), False),
    **dict.fromkeys(("axes.linewidth", "grid.linewidth"), 1),
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "ytick.major.size": 0,
}
#: A line with its band in a colour: (x, estimate, note), the note is shown when the pointer rests on the point.
Line = tuple[int, Sequence[tuple[float, Estimate, str]]]


def _drawn(paint: Callable[[Any], None], size: tuple[int, int], box: tuple[int, int, int, int], **labels: Any) -> str:
    """What ``paint`` draws into the axes in ``box`` (left, bottom, right, top; pixels), as the inside of an SVG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    (width, height), (left, bottom, right, top) = size, box
    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure = Figure((width / 72, height / 72), frameon=False)
        FigureCanvasSVG(figure)
        place = (left / width, bottom / height, (right - left) / width, (top - bottom) / height)
        axes = figure.add_axes(place, facecolor="none", **labels)
        paint(axes)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = " ".join(buffer.getvalue().split())
    # No identifiers are left: a page holds many charts.
    shapes = dict(re.findall(r'<path id="(\w+)" d="([^"]*)"', text))
    text = re.sub(r"<defs>.*?</defs>", "", text[text.index("<g") : text.rindex("</svg>")])
    text = re.sub(
        r'<use xlink:href="#(\w+)" x="(\S+)" y="(\S+)" style="([^"]*)"/>',
        lambda use: f'<path d="{shapes[use[1]]}" transform="translate({use[2]} {use[3]})" style="{use[4]}"/>',
        text,
    )
    text = re.sub(r'<g id="note:([^"]*)">', r"<g><title>\1</title>", text)
    text = re.sub(r' clip-path="[^"]*"|<g id="[^"]*"/>', "", re.sub(r'<g id="[^"]*">', "<g>", text))
    text = re.sub(r' ?font-family: [^;"]*;?', "", re.sub(r'font: (\w+) [^;"]*', r"font-size: \1", text))
    return re.sub("|".join(_VARIABLES), lambda colour: f"var(--{_VARIABLES[colour[0]]})", text)


def _chart(ident: str, title: str, x_label: str, y_label: str, paint: Callable[[Any], None]) -> str:
    inside = _drawn(paint, (WIDTH, HEIGHT), (46, 46, WIDTH - 12, HEIGHT - 12), xlabel=x_label, ylabel=y_label)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{ident}">'
        f'<title id="{ident}">{escape(title)}</title>{inside}</svg>'
    )


def _curve(axes: Any, colour: int, x: Sequence[float], y: Sequence[float]) -> None:
    axes.plot(x, y, color=_MODEL[colour], linestyle=_DASHES[colour], linewidth=1.8)


def _marker(axes: Any, colour: int, x: float, y: float, note: str) -> None:
    edge = {"markeredgecolor": _PAPER, "markeredgewidth": 0.8, "markersize": 6.5, "zorder": 3}
    axes.plot([x], [y], linestyle="", marker=_MARKERS[colour], color=_MODEL[colour], gid=f"note:{note}", **edge)


def _band(axes: Any, colour: int, points: Sequence[tuple[float, float | None, float | None]]) -> None:
    bounds = [(x, low, high) for x, low, high in points if low is not None and high is not None]
    if len(bounds) > 1:
        axes.fill_between(*zip(*bounds, strict=True), color=_MODEL[colour], alpha=0.17, linewidth=0)


def _rule(draw: Callable[..., Any], at: float) -> None:
    draw(at, color=_INK, linewidth=1, linestyle=(0, (4, 3)))


def swatch(colour: int) -> str:
    """A short line with the marker of a colour, for legends."""

    def paint(axes: Any) -> None:
        axes.set(xlim=(0, 1), ylim=(-1, 1))
        axes.set_axis_off()
        _curve(axes, colour, (0, 1), (0, 0))
        _marker(axes, colour, 0.5, 0, "")

    inside = _drawn(paint, (28, 12), (2, 0, 26, 12)).replace("<title></title>", "")
    return f'<svg class="swatch" viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">{inside}</svg>'


def curves(ident: str, title: str, lines: Sequence[Line], *, x_label: str, ticks: Sequence[float]) -> str:
    """Mean Dice, from 0 to 1, as lines with bands and markers.

    The x axis has ``ticks``, ascending from 0, as many as can be read. Where the last is far above the first after 0,
    it is logarithmic from there on.
    """

    def paint(axes: Any) -> None:
        for colour, points in lines:
            _band(axes, colour, [(x, dice.low, dice.high) for x, dice, _ in points])
        for colour, points in lines:
            _curve(axes, colour, [x for x, _, _ in points], [dice.estimate for _, dice, _ in points])
            for x, dice, note in points:
                _marker(axes, colour, x, dice.estimate, note)
        if len(ticks) > 2 and ticks[-1] > 6 * ticks[1]:
            decades = math.log10(ticks[-1] / ticks[1])
            step = max(decades / (len(ticks) - 2), 0.15 * decades)
            axes.set_xscale("symlog", linthresh=ticks[1], linscale=0.9 * step)
        at = dict(zip(ticks, axes.xaxis.get_transform().transform(ticks), strict=True))
        shown = [ticks[0]]
        for tick in reversed(ticks[1:]):
            if all(abs(at[tick] - at[other]) >= 0.11 * at[ticks[-1]] for other in shown):
                shown.append(tick)
        axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
        axes.set(xlim=(ticks[0], ticks[-1] or 1.0), ylim=(0, 1))
        axes.spines.bottom.set_position(("outward", 6))

    return _chart(ident, title, x_label, "mean Dice", paint)


def histogram(ident: str, title: str, values: Sequence[float], colour: int, x_label: str) -> str:
    """How many training cases have each of ``values``, from 0 on, with their median as a line."""

    def paint(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.set_xlim(0, max(values))
        top = axes.get_xlim()[1]
        counts, edges, bars = axes.hist(values, bins=24, range=(0, top), color=_MODEL[colour], rwidth=0.9)
        for count, low, high, bar in zip(counts, edges, edges[1:], bars, strict=False):
            bar.set_gid(f"note:{count:g} cases from {low:.3g} to {high:.3g}")
        axes.set_ylim(0, max(counts) * 1.12)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        middle = median(values)
        late = middle > top / 2
        _rule(axes.axvline, middle)
        place = {"xytext": (-5 if late else 5, 0), "textcoords": "offset points", "ha": "right" if late else "left"}
        axes.annotate(f"median {middle:.3g}", (middle, max(counts) * 1.06), color=_MUTED, **place)

    return _chart(ident, title, x_label, "training cases", paint)


def course(ident: str, title: str, rows: Sequence[Sequence[float]], colour: int, y_label: str, cap: float) -> str:
    """The middle of five quantiles over two bands; ``cap`` is drawn where it is in sight, NaN for none.

    Each row is an epoch and its quantiles, ascending.
    """

    def paint(axes: Any) -> None:
        x, *quantiles = zip(*rows, strict=True)
        for low in (0, 1):
            _band(axes, colour, list(zip(x, quantiles[low], quantiles[-1 - low], strict=True)))
        _curve(axes, colour, x, quantiles[2])
        top = max(quantiles[-1])
        if cap <= 1.6 * top:
            _rule(axes.axhline, cap)
            axes.annotate(f"cap {cap:.3g}", (x[0], cap), (5, 4), textcoords="offset points", color=_MUTED)
            top = max(top, 1.08 * cap)
        axes.set(xlim=(x[0], x[-1]), ylim=(0, 1.02 * top))

    return _chart(ident, title, "epoch", y_label, paint)
