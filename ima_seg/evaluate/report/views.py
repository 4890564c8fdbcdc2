"""What the page shows, as plain data for its template: charts, tables, panels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ima_seg.evaluate.measure.collect import Evaluation
from ima_seg.evaluate.measure.groups import WORST, WORST_OF, group_records, worst_groups
from ima_seg.evaluate.measure.summary import Condition, Summary
from ima_seg.evaluate.records import Record
from ima_seg.evaluate.report import charts
from ima_seg.evaluate.report.panels import CLASS_COLOURS, Panel, read_panel
from ima_seg.evaluate.report.words import KINDS, attack_name, describe, network_unit, unit_short
from ima_seg.evaluate.run import Run

#: At most so many panels per model, and so many characters of pictures in all.
PANELS_PER_MODEL = 3
PANEL_CHARACTERS = 3_500_000


@dataclass(frozen=True)
class Chart:
    """An SVG with its heading and explanation."""

    title: str
    note: str
    svg: str


@dataclass(frozen=True)
class Shown:
    """A panel with the record it belongs to."""

    record: Record
    clean: float
    panel: Panel


def colours(run: Run) -> dict[str, int]:
    """Colour number of each model."""
    return {model.name: i % charts.COLOURS for i, model in enumerate(run.models)}


def _facets(run: Run, conditions: Sequence[Condition]) -> dict[str, list[Condition]]:
    """Conditions with a budget by chart: the worst first; of two models the one transfer of each shares a chart."""
    facets: dict[str, list[Condition]] = {WORST: []}
    for c in conditions:
        if c.eps is None or c.kind not in (*WORST_OF, "noise", WORST):
            continue
        facets.setdefault("transfer" if c.kind == "transfer" and len(run.models) == 2 else c.attack, []).append(c)
    return {name: items for name, items in facets.items() if items}


def _line(summary: Summary, model: str, colour: int, items: Iterable[tuple[float, Condition]]) -> list[charts.Line]:
    """The line of a model through its clean Dice, at 0, and (x, condition); none without a point."""
    clean = summary.find(model, "clean")
    mine = sorted(((x, c) for x, c in items if c.model == model), key=lambda item: item[0])
    points = [
        charts.Point(x, c.dice.estimate, c.dice.low, c.dice.high, describe(c))
        for x, c in ([(0.0, clean)] if clean and mine else []) + mine
        if c.dice is not None
    ]
    return [charts.Line(colour, points)] if points else []


def dice_charts(run: Run, summary: Summary) -> list[Chart]:
    """Dice against eps, one chart per attack, one line per model."""
    found = []
    for number, (name, conditions) in enumerate(_facets(run, summary.conditions).items()):
        items = [(c.eps or 0.0, c) for c in conditions]
        title = "Transfer from the other model" if name == "transfer" else attack_name(name)
        svg = charts.curves(
            f"curve-{number}",
            f"Mean Dice against eps, {title}",
            [line for model, colour in colours(run).items() for line in _line(summary, model, colour, items)],
            f"eps ({unit_short(run)})",
            "mean Dice",
            sorted({0.0, *(eps for eps, _ in items)}),
            log=True,
        )
        found.append(Chart(title, KINDS[conditions[0].kind], svg))
    return found


def corruption_charts(run: Run, summary: Summary) -> list[Chart]:
    """Dice against severity, one chart per corruption."""
    facets: dict[str, list[tuple[float, Condition]]] = {}
    for c in summary.conditions:
        if c.kind == "corruption" and c.severity is not None:
            facets.setdefault(c.attack, []).append((float(c.severity), c))
    found = []
    for number, (name, items) in enumerate(facets.items()):
        svg = charts.curves(
            f"corruption-{number}",
            f"Mean Dice against severity, {attack_name(name)}",
            [line for model, colour in colours(run).items() for line in _line(summary, model, colour, items)],
            "severity (0: unchanged)",
            "mean Dice",
            [float(i) for i in range(1 + int(max(severity for severity, _ in items)))],
        )
        found.append(Chart(attack_name(name), "", svg))
    return found


def _finite(row: Mapping[str, Any], name: str) -> float | None:
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def margin_charts(run: Run) -> list[Chart]:
    """Histogram and course of the margins of each model that has them."""
    found = []
    for number, model in enumerate(run.models):
        ima = model.ima or {}
        colour = colours(run)[model.name]
        unit = "SD, largest change per voxel" if ima.get("norm") == "linf" else "SD, RMS per voxel"
        margins = [float(v) for v in (ima.get("margins") or {}).values() if v is not None and math.isfinite(float(v))]
        if margins and max(margins) > 0:
            svg = charts.histogram(
                f"margins-{number}", f"Margins of {model.name}", margins, colour, f"margin ({unit})", "training cases"
            )
            found.append(
                Chart(f"Margins of {model.name}", f"{len(margins)} training cases at the end of training", svg)
            )
        rows = list(ima.get("history") or [])
        names = ("epoch", "margin_q05", "margin_q25", "margin_q50", "margin_q75", "margin_q95")
        points = [tuple(_finite(row, name) for name in names) for row in rows]
        whole = [[v for v in point if v is not None] for point in points if None not in point]
        if len(whole) > 1 and any(max(p[1:]) > 0 for p in whole):
            svg = charts.course(
                f"course-{number}",
                f"Course of the margins of {model.name}",
                [[(p[0], p[1], p[5]) for p in whole], [(p[0], p[2], p[4]) for p in whole]],
                [(p[0], p[3]) for p in whole],
                colour,
                "epoch",
                f"margin ({unit})",
                _finite(ima, "eps_max"),
            )
            note = "Median over training cases, with the ranges from 25 to 75 % and from 5 to 95 %"
            found.append(Chart(f"Course of the margins of {model.name}", note, svg))
    return found


def budget_sizes(run: Run, summary: Summary) -> list[tuple[float, dict[str, float | None]]]:
    """For each eps the largest mean size that any attack with this budget used, in each unit that there is."""
    found = []
    for eps in sorted(run.settings.eps):
        sizes = [c.size for c in summary.conditions if c.eps == eps and c.size is not None and c.kind != "targeted"]
        if sizes:
            names = ("rms", "linf", "native_rms", "percent_rms")
            found.append(
                (
                    eps,
                    {
                        name: max((v for size in sizes if (v := getattr(size, name)) is not None), default=None)
                        for name in names
                    },
                )
            )
    return found


def attack_rows(summary: Summary) -> dict[str, list[Condition]]:
    """Conditions of the main table by attack, the worst first, then by eps and model."""
    kinds = (WORST, *WORST_OF, "noise")
    found: dict[str, list[Condition]] = {WORST: []}
    for c in summary.conditions:
        if c.kind in kinds:
            found.setdefault(c.attack, []).append(c)
    models = list(dict.fromkeys(c.model for c in summary.conditions))
    for items in found.values():
        items.sort(key=lambda c: (c.eps or 0.0, models.index(c.model)))
    # Transfers from different models side by side.
    families = list(dict.fromkeys(name.split(":")[0] for name in found))
    ordered = sorted(found.items(), key=lambda item: families.index(item[0].split(":")[0]))
    return {name: items for name, items in ordered if items}


def class_rows(run: Run, summary: Summary) -> list[tuple[str, list[tuple[str, Condition]]]]:
    """(heading, (class, condition)) for the clean images and the worst attack at each eps."""
    found = []
    for attack, eps in [("clean", None), *((WORST, e) for e in sorted(run.settings.eps))]:
        there = [c for model in run.models if (c := summary.find(model.name, attack, eps)) is not None]
        if there:
            heading = "Unchanged images" if eps is None else f"Worst attack at eps {eps:g}"
            found.append((heading, [(name, c) for name in run.classes for c in there]))
    return found


@dataclass(frozen=True)
class CaseTable:
    """Dice per case; ``columns`` are (model, what), ``rows`` (case, values, remark)."""

    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[float | None], str]]


def case_table(evaluation: Evaluation, summary: Summary) -> CaseTable:
    """Per case the clean Dice, that of the worst attack at each eps, and the smallest breaking size."""
    run = evaluation.run
    groups = group_records(evaluation.records)
    everything = groups | worst_groups(groups)[0]
    failed = {failure.case for failure in evaluation.failures}
    lacking = {item.case for item in summary.incomplete if not item.failed}
    columns: list[tuple[str, str]] = []
    values: list[dict[str, float | None]] = []
    for model in run.models:
        for group, records in sorted(
            everything.items(), key=lambda item: (item[0].kind == "minimal", item[0].eps or 0)
        ):
            if group.model != model.name or group.kind not in ("clean", WORST, "minimal"):
                continue
            if group.kind == "minimal":
                columns.append((model.name, f"breaking RMS, {network_unit(run)}"))
                values.append({case: record.breaking_rms for case, record in records.items()})
            else:
                columns.append((model.name, "clean" if group.eps is None else f"eps {group.eps:g}"))
                values.append({case: record.dice for case, record in records.items()})
    rows = []
    for case in run.cases:
        remark = "failed" if case in failed else "incomplete" if case in lacking else ""
        rows.append((case, [column.get(case) for column in values], remark))
    return CaseTable(columns, rows)


def panels(evaluation: Evaluation) -> list[Shown]:
    """The cases of each model that lose most Dice at a middle budget, as far as there are pictures and room."""
    clean = {(r.case, r.model): r.dice for r in evaluation.records if r.kind == "clean" and r.dice is not None}
    found: list[Shown] = []
    room = PANEL_CHARACTERS
    for model in evaluation.run.models:
        usable = [
            r
            for r in evaluation.records
            if r.model == model.name
            and r.kind in WORST_OF
            and r.eps is not None
            and r.dice is not None
            and r.key in evaluation.panels
            and (r.case, r.model) in clean
        ]
        budgets = sorted({r.eps for r in usable if r.eps is not None})
        if not budgets:
            continue
        middle = budgets[len(budgets) // 2]
        lowest: dict[str, Record] = {}
        for r in usable:
            if r.eps == middle and (r.case not in lowest or (r.dice or 0.0) < (lowest[r.case].dice or 0.0)):
                lowest[r.case] = r
        drops = sorted(lowest.values(), key=lambda r: (r.dice or 0.0) - clean[r.case, r.model])
        shown = 0
        for r in drops:
            panel = read_panel(evaluation.panels[r.key]) if shown < PANELS_PER_MODEL else None
            if panel is not None and panel.length <= room:
                room -= panel.length
                shown += 1
                found.append(Shown(r, clean[r.case, r.model], panel))
    return found


def class_swatches(run: Run) -> list[tuple[str, str]]:
    """Class and its colour in the panels."""
    return [
        (name, "rgb({}, {}, {})".format(*CLASS_COLOURS[i % len(CLASS_COLOURS)])) for i, name in enumerate(run.classes)
    ]
