"""What the page shows, as plain data for its template: charts, tables, panels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


#: Heading, explanation and SVG.
Chart = tuple[str, str, str]


class Shown(NamedTuple):
    """A panel with the record it belongs to."""

    record: Record
    clean: float
    panel: Panel


def colours(run: Run) -> dict[str, int]:
    """Colour number of each model."""
    return {model.name: i % charts.COLOURS for i, model in enumerate(run.models)}


def _curves(
    run: Run, summary: Summary, ident: str, facets: Mapping[str, Sequence[tuple[float, Condition]]], x_label: str
) -> list[Chart]:
    """A chart per facet: one line per model through its clean Dice, at 0, and its (x, condition)."""
    found = []
    for number, (name, items) in enumerate(facets.items()):
        lines = []
        for model, colour in colours(run).items():
            clean = summary.find(model, "clean")
            mine = sorted(((x, c) for x, c in items if c.model == model), key=lambda item: item[0])
            if mine and clean is not None:
                mine.insert(0, (0.0, clean))
            points = [(x, c.dice, describe(c)) for x, c in mine if c.dice is not None]
            if points:
                lines.append((colour, points))
        heading = "Transfer from the other model" if name == "transfer" else attack_name(name)
        title, ticks = f"Mean Dice against {x_label}, {heading}", sorted({0.0, *(x for x, _ in items)})
        svg = charts.curves(f"{ident}-{number}", title, lines, x_label=x_label, ticks=ticks)
        found.append((heading, KINDS[items[0][1].kind], svg))
    return found


def dice_charts(run: Run, summary: Summary) -> list[Chart]:
    """Dice against eps, one chart per attack; the worst comes first, the transfers of two models share a chart."""
    facets: dict[str, list[tuple[float, Condition]]] = defaultdict(list)
    for c in sorted(summary.conditions, key=lambda c: c.kind != WORST):
        if c.eps is not None and c.kind in (*WORST_OF, "noise", WORST):
            name = "transfer" if c.kind == "transfer" and len(run.models) == 2 else c.attack
            facets[name].append((c.eps, c))
    return _curves(run, summary, "curve", facets, f"eps ({unit_short(run)})")


def corruption_charts(run: Run, summary: Summary) -> list[Chart]:
    """Dice against severity, one chart per corruption."""
    facets: dict[str, list[tuple[float, Condition]]] = defaultdict(list)
    for c in summary.conditions:
        if c.kind == "corruption" and c.severity is not None:
            facets[c.attack].append((float(c.severity), c))
    return _curves(run, summary, "corruption", facets, "severity (0: unchanged)")


def _finite(row: Mapping[str, Any], name: str) -> float:
    """NaN where there is no finite number."""
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        return math.nan
    return value if math.isfinite(value) else math.nan


def margin_charts(run: Run) -> list[Chart]:
    """Histogram and course of the margins of each model that has them."""
    found: list[Chart] = []
    for number, (model, colour) in enumerate(zip(run.models, colours(run).values(), strict=True)):
        ima = model.ima or {}
        label = f"margin (SD, {'largest change' if ima.get('norm') == 'linf' else 'RMS'} per voxel)"
        title = f"Margins of {model.name}"
        margins = [v for name in ima.get("margins") or {} if not math.isnan(v := _finite(ima["margins"], name))]
        if margins and max(margins) > 0:
            svg = charts.histogram(f"margins-{number}", title, margins, colour, label)
            found.append((title, f"{len(margins)} training cases at the end of training", svg))
        title = f"Course of the margins of {model.name}"
        names = ("epoch", "margin_q05", "margin_q25", "margin_q50", "margin_q75", "margin_q95")
        points = [tuple(_finite(row, name) for name in names) for row in ima.get("history") or []]
        rows = [row for row in points if not any(map(math.isnan, row))]
        if len(rows) > 1 and any(max(row[1:]) > 0 for row in rows):
            svg = charts.course(f"course-{number}", title, rows, colour, label, _finite(ima, "eps_max"))
            note = "Median over training cases, with the ranges from 25 to 75 % and from 5 to 95 %"
            found.append((title, note, svg))
    return found


def budget_sizes(run: Run, summary: Summary) -> list[tuple[float, dict[str, float | None]]]:
    """For each eps the largest mean size that any attack with this budget used, in each unit that there is."""
    found = []
    for eps in sorted(run.settings.eps):
        sizes = [c.size for c in summary.conditions if c.eps == eps and c.size is not None and c.kind != "targeted"]
        if sizes:
            values = {name: [getattr(size, name) for size in sizes] for name in type(sizes[0]).model_fields}
            largest = {k: max((v for v in each if v is not None), default=None) for k, each in values.items()}
            found.append((eps, largest))
    return found


def attack_rows(summary: Summary) -> dict[str, list[Condition]]:
    """Conditions of the main table by attack, the worst first, then by eps and model."""
    shown = [c for c in summary.conditions if c.kind in (WORST, *WORST_OF, "noise")]
    models = list(dict.fromkeys(c.model for c in summary.conditions))
    # Transfers from different models side by side.
    families = list(dict.fromkeys([WORST, *(c.attack.split(":")[0] for c in shown)]))
    found: dict[str, list[Condition]] = defaultdict(list)
    for c in sorted(shown, key=lambda c: (families.index(c.attack.split(":")[0]), c.eps or 0.0, models.index(c.model))):
        found[c.attack].append(c)
    return found


def case_table(evaluation: Evaluation, summary: Summary) -> dict[str, list[Any]]:
    """Per case the clean Dice, that of the worst attack at each eps, and the smallest breaking size.

    Columns are (model, what), rows (case, values, remark).
    """
    run = evaluation.run
    groups = group_records(evaluation.records)
    groups |= worst_groups(groups)[0]
    columns: dict[tuple[str, str], dict[str, float | None]] = {}
    for model in run.models:
        mine = {group: records for group, records in groups.items() if group.model == model.name}
        for group, records in sorted(mine.items(), key=lambda item: (item[0].kind == "minimal", item[0].eps or 0)):
            if group.kind == "minimal":
                what, field = f"breaking RMS, {network_unit(run)}", "breaking_rms"
            elif group.kind in ("clean", WORST):
                what, field = "clean" if group.eps is None else f"eps {group.eps:g}", "dice"
            else:
                continue
            columns[model.name, what] = {case: getattr(record, field) for case, record in records.items()}
    remarks = {item.case: "incomplete" for item in summary.incomplete if not item.failed}
    remarks |= {failure.case: "failed" for failure in evaluation.failures}
    rows = [(c, [column.get(c) for column in columns.values()], remarks.get(c, "")) for c in run.cases]
    return {"case_columns": list(columns), "case_rows": rows}


def panels(evaluation: Evaluation) -> list[Shown]:
    """The cases of each model that lose most Dice at a middle budget, as far as there are pictures and room."""
    clean = {(r.case, r.model): r.dice for r in evaluation.records if r.kind == "clean" and r.dice is not None}
    found: list[Shown] = []
    room = PANEL_CHARACTERS
    for model in evaluation.run.models:
        usable = [
            (r.eps, r.dice - clean[r.case, r.model], r)
            for r in evaluation.records
            if r.model == model.name and r.kind in WORST_OF and r.eps is not None and r.dice is not None
            if r.key in evaluation.panels and (r.case, r.model) in clean
        ]
        budgets = sorted({eps for eps, _, _ in usable})
        middle = [item for item in usable if item[0] == budgets[len(budgets) // 2]]
        drops: dict[str, Record] = {}
        for _, _, r in sorted(middle, key=lambda item: item[1]):
            drops.setdefault(r.case, r)
        shown = 0
        for r in drops.values():
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
