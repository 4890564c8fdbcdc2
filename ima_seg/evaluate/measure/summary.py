"""The numbers of an evaluation: means with intervals, comparisons, areas, breaking sizes; nothing is recomputed.

One file: its types are the layout of ``summary.json``, and each stands beside what fills it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from ima_seg.evaluate.measure.compare import CleanCost, Comparison, clean_costs, comparisons
from ima_seg.evaluate.measure.groups import WORST, WORST_OF, Group, Groups, clean_dice, group_records, worst_groups
from ima_seg.evaluate.measure.statistics import (
    Breaking,
    Estimate,
    area_under_dice,
    bootstrap_mean,
    mean,
    median_breaking,
    pooled_dice,
    wilson,
)
from ima_seg.evaluate.records import ClassMetrics, Disk, Failure, Record, Size
from ima_seg.evaluate.run import Run, Strict


class ClassSummary(Strict):
    """One class over the cases of a condition."""

    dice: Estimate | None
    nsd: Estimate | None
    hd95_mm: Estimate | None
    pooled_dice: float | None  # from the voxel counts of all cases together
    volume_error_ml: float | None  # mean of predicted minus reference volume
    states: dict[str, int]


class SizeSummary(Strict):
    """Mean size of the perturbations of a condition; percentages are means over channels too."""

    rms: float
    linf: float
    l2: float
    percent_rms: float | None  # None: no way to original intensities
    native_rms: float | None
    psnr_db: float | None
    ssim: float | None


class Condition(Strict):
    """One model under one attack and budget, or one corruption and severity, or unchanged images.

    Attributes:
        n: cases with a record; ``undefined`` of them have no Dice (no class in reference or prediction).
        missing: cases of the run without a record.
        partial: of ``worst``: cases for which fewer attacks were recorded than for others.
        eps_network: median over cases of the budget per voxel in SDs; ``eps_network_range`` its extremes.
        pooled_dice: mean over classes of their pooled Dice.
        success: share of cases that broke; ``success_left_out`` cases have no clean Dice, or 0, and do not count.
    """

    model: str
    kind: str
    attack: str
    eps: float | None
    severity: int | None
    n: int
    undefined: int
    missing: int
    partial: int = 0
    eps_network: float | None
    eps_network_range: tuple[float, float] | None
    dice: Estimate | None
    nsd: Estimate | None
    hd95_mm: Estimate | None
    pooled_dice: float | None
    slice_dice: Estimate | None
    classes: dict[str, ClassSummary]
    success: Estimate | None
    success_left_out: int
    size: SizeSummary | None


class Area(Strict):
    """Normalised area under the Dice-eps curve from 0 to the largest eps; cases that lack a point are left out."""

    model: str
    attack: str
    area: Estimate | None
    left_out: int


class Targeted(Strict):
    """One organ made to disappear or to appear."""

    model: str
    attack: str
    target: str
    eps: float | None
    share: Estimate | None  # volume left, of that in the reference; or predicted, of that on the clean image
    dice: Estimate | None
    n: int
    left_out: int  # nothing to divide by


class Saved(Strict):
    """Adversarial files of one model, attack and budget, read again from disk."""

    model: str
    attack: str
    eps: float | None
    n: int
    resampled: int  # files of which the plans resample the image; there the two Dice may differ
    rounded: int = 0  # files that hold whole numbers only; the same
    dice: float | None  # mean in network space, as everywhere else in the report
    disk_dice: float | None  # of the files, predicted anew
    rms: float | None  # mean size in network space, SD per voxel
    disk_rms: float | None  # the same, measured on the files


class Incomplete(Strict):
    """A case that lacks records which other cases of the same model have."""

    case: str
    model: str
    lacking: list[str]  # empty: it has no record at all
    failed: bool


class Summary(Strict):
    """``summary.json``."""

    version: int = 1
    reference: str
    cases: int
    conditions: list[Condition]
    areas: list[Area]
    breaking: list[Breaking]
    targeted: list[Targeted]
    comparisons: list[Comparison]
    clean_costs: list[CleanCost]
    saved: list[Saved]
    incomplete: list[Incomplete]
    forwards: int
    gradients: int
    seconds: float

    def find(self, model: str, attack: str, eps: float | None = None, severity: int | None = None) -> Condition | None:
        """The condition, if it was evaluated."""
        wanted = (model, attack, eps, severity)
        return next((c for c in self.conditions if (c.model, c.attack, c.eps, c.severity) == wanted), None)


def summarise(run: Run, records: Sequence[Record], failures: Sequence[Failure]) -> Summary:
    """Summarise the records of a run; the first model of the run is the reference of all comparisons."""
    groups = group_records(records)
    worst, partial = worst_groups(groups)
    first = {"clean": 0, WORST: 1}
    everything = dict(sorted((groups | worst).items(), key=lambda item: first.get(item[0].kind, 2)))
    clean = {model.name: clean_dice(groups, model.name) for model in run.models}
    return Summary(
        reference=run.models[0].name,
        cases=len(run.cases),
        conditions=[
            _condition(run, group, list(members.values()), clean.get(group.model, {}), len(partial.get(group, ())))
            for group, members in everything.items()
        ],
        areas=_areas(everything, clean),
        breaking=_breaking(groups, clean),
        targeted=_targeted(groups),
        comparisons=comparisons([model.name for model in run.models], _dice_of_groups(everything, partial)),
        clean_costs=clean_costs([model.name for model in run.models], clean),
        saved=_saved(records),
        incomplete=_incomplete(run, groups, failures),
        forwards=sum(r.forwards for r in records),
        gradients=sum(r.gradients for r in records),
        seconds=math.fsum(r.seconds + r.metric_seconds for r in records),
    )


def _dice_of_groups(groups: Groups, partial: Mapping[Group, set[str]]) -> dict[Group, dict[str, float]]:
    """What models are compared by. A worst case over fewer attacks is no match for one over all; transferred
    perturbations come from another model for each.
    """
    kinds = {"clean", "noise", WORST, *WORST_OF} - {"transfer"}
    return {
        group: {
            case: record.dice
            for case, record in records.items()
            if record.dice is not None and case not in partial.get(group, ())
        }
        for group, records in groups.items()
        if group.kind in kinds
    }


def _estimates(items: Sequence[Record] | Sequence[ClassMetrics]) -> dict[str, Any]:
    return {name: bootstrap_mean(getattr(item, name) for item in items) for name in ("dice", "nsd", "hd95_mm")}


def _condition(
    run: Run, group: Group, records: Sequence[Record], clean: Mapping[str, float], partial: int
) -> Condition:
    classes = {name: _class([r.classes[name] for r in records if name in r.classes]) for name in run.classes}
    budgets = [r.eps_network for r in records if r.eps_network is not None]
    usable = [r for r in records if r.dice is not None and clean.get(r.case, 0.0) > 0]
    broken = sum((r.dice or 0.0) < run.settings.broken_below * clean[r.case] for r in usable)
    attacked = group.kind != "clean"
    return Condition(
        **group._asdict(),
        **_estimates(records),
        n=len(records),
        undefined=sum(r.dice is None for r in records),
        missing=0 if group.kind == "targeted" else len(run.cases) - len(records),
        partial=partial,
        eps_network=median(budgets) if budgets else None,
        eps_network_range=(min(budgets), max(budgets)) if budgets else None,
        pooled_dice=mean(summary.pooled_dice for summary in classes.values()),
        slice_dice=bootstrap_mean(r.slice_dice.mean for r in records if r.slice_dice is not None),
        classes=classes,
        success=wilson(broken, len(usable)) if attacked else None,
        success_left_out=len(records) - len(usable) if attacked else 0,
        size=_size([r.size for r in records if r.size is not None]),
    )


def _class(items: Sequence[ClassMetrics]) -> ClassSummary:
    counts = [[getattr(item, name) for item in items] for name in ("tp", "fp", "fn")]
    return ClassSummary(
        **_estimates(items),
        pooled_dice=pooled_dice(*counts),
        volume_error_ml=mean(item.volume_error_ml for item in items if item.state != "both_empty"),
        states=dict(sorted(Counter(item.state for item in items).items())),
    )


def _size(sizes: Sequence[Size]) -> SizeSummary | None:
    def average(name: str) -> float | None:
        values = [getattr(size, name) for size in sizes]
        return mean(mean(value) if isinstance(value, list) else value for value in values)

    return SizeSummary.model_validate({name: average(name) for name in SizeSummary.model_fields}) if sizes else None


def _areas(groups: Groups, clean: Mapping[str, Mapping[str, float]]) -> list[Area]:
    curves: dict[tuple[str, str], dict[float, dict[str, Record]]] = defaultdict(dict)
    for group, records in groups.items():
        if group.eps is not None and group.kind in (*WORST_OF, "noise", WORST):
            curves[group.model, group.attack][group.eps] = records
    areas = []
    for (model, attack), by_eps in curves.items():
        eps = sorted(by_eps)
        values = []
        cases = dict.fromkeys(case for records in by_eps.values() for case in records)
        for case in cases:
            dice = [clean[model].get(case), *(by_eps[e][case].dice if case in by_eps[e] else None for e in eps)]
            present = [value for value in dice if value is not None]
            if len(present) == len(dice):
                values.append(area_under_dice([0.0, *eps], present))
        areas.append(Area(model=model, attack=attack, area=bootstrap_mean(values), left_out=len(cases) - len(values)))
    return areas


def _breaking(groups: Groups, clean: Mapping[str, Mapping[str, float]]) -> list[Breaking]:
    found = []
    for group, records in groups.items():
        if group.kind == "minimal":
            # What has no clean Dice to lose is not robust.
            sizes = [r.breaking_rms for case, r in records.items() if clean[group.model].get(case, 0) > 0]
            found.append(median_breaking(sizes, group.model, group.attack))
    return [result for result in found if result is not None]


def _targeted(groups: Groups) -> list[Targeted]:
    found = []
    for group, records in groups.items():
        if group.kind != "targeted":
            continue
        goal, _, target = group.attack.partition(":")
        before = groups.get(Group(group.model, "clean", "clean", None, None), {})
        there = {case: record.classes[target] for case, record in records.items() if target in record.classes}
        shares = []
        for case, now in there.items():
            base = now.reference_ml
            if goal == "appear":
                base = before[case].classes[target].prediction_ml if case in before else 0.0
            if base > 0:
                shares.append(now.prediction_ml / base)
        found.append(
            Targeted(
                model=group.model,
                attack=group.attack,
                target=target,
                eps=group.eps,
                share=bootstrap_mean(shares),
                dice=bootstrap_mean(now.dice for now in there.values()),
                n=len(records),
                left_out=len(records) - len(shares),
            )
        )
    return found


def _saved(records: Iterable[Record]) -> list[Saved]:
    """One row per model, attack and budget with saved files, in the order of the records."""
    groups: dict[tuple[str, str, float | None], list[tuple[Record, Disk]]] = defaultdict(list)
    for r in records:
        if r.disk is not None:
            groups[r.model, r.attack, r.eps].append((r, r.disk))
    rows = []
    for (model, attack, eps), members in groups.items():
        both = [(r.dice, disk.dice) for r, disk in members if r.dice is not None and disk.dice is not None]
        rows.append(
            Saved(
                model=model,
                attack=attack,
                eps=eps,
                n=len(members),
                resampled=sum(disk.resampled for _, disk in members),
                rounded=sum(disk.rounded for _, disk in members),
                dice=mean(dice for dice, _ in both),
                disk_dice=mean(dice for _, dice in both),
                rms=mean(r.size.rms for r, _ in members if r.size is not None),
                disk_rms=mean(disk.rms for _, disk in members),
            )
        )
    return rows


def _incomplete(run: Run, groups: Groups, failures: Sequence[Failure]) -> list[Incomplete]:
    failed = {(failure.case, failure.model) for failure in failures}
    found = []
    for model in (item.name for item in run.models):
        mine = {group: records for group, records in groups.items() if group.model == model}
        there = {(group.attack, group.eps, group.severity): records for group, records in mine.items()}
        required = run.conditions.get(model) or list(there)
        for case in run.cases:
            lacking = [
                str(Group(model, "", attack, eps, severity))
                for attack, eps, severity in required
                if case not in there.get((attack, eps, severity), {})
            ]
            if lacking or not required:
                none = not any(case in records for records in mine.values())
                did_fail = (case, model) in failed or (case, None) in failed
                found.append(Incomplete(case=case, model=model, lacking=[] if none else lacking, failed=did_fail))
    return found
