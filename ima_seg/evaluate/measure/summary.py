"""The numbers of an evaluation: means with intervals, comparisons, areas, breaking sizes; nothing is recomputed."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from ima_seg.evaluate.measure.compare import CleanCost, Comparison, clean_costs, comparisons
from ima_seg.evaluate.measure.estimates import Estimate, estimate, mean, median
from ima_seg.evaluate.measure.saved import Saved, saved_files
from ima_seg.evaluate.measure.statistics import area_under_dice, median_breaking, pooled_dice, wilson
from ima_seg.evaluate.records import ClassMetrics, Failure, Record
from ima_seg.evaluate.run import Run

#: Kinds of attacks of which the worst per case is taken.
WORST_OF = ("white", "black", "transfer")
#: Name of the pseudo-attack: per case the attack with the lowest Dice.
WORST = "worst"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ClassSummary(_Strict):
    """One class over the cases of a condition."""

    dice: Estimate | None
    nsd: Estimate | None
    hd95_mm: Estimate | None
    pooled_dice: float | None  # from the voxel counts of all cases together
    volume_error_ml: float | None  # mean of predicted minus reference volume
    states: dict[str, int]


class SizeSummary(_Strict):
    """Mean size of the perturbations of a condition; percentages are means over channels too."""

    rms: float
    linf: float
    l2: float
    percent_rms: float | None  # None: no way to original intensities
    native_rms: float | None
    psnr_db: float | None
    ssim: float | None


class Condition(_Strict):
    """One model under one attack and budget, or one corruption and severity, or unchanged images.

    Attributes:
        n: cases with a record; ``undefined`` of them have no Dice (no class in reference or prediction).
        missing: cases of the run without a record.
        partial: of ``worst``: cases for which fewer attacks were recorded than for others.
        eps_network: median over cases of the budget per voxel in network units; ``eps_network_range`` its extremes.
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


class Area(_Strict):
    """Normalised area under the Dice-eps curve from 0 to the largest eps; cases that lack a point are left out."""

    model: str
    attack: str
    area: Estimate | None
    left_out: int


class Breaking(_Strict):
    """Smallest perturbations that break a case; unbroken cases count as larger than any."""

    model: str
    attack: str
    median_rms: float | None  # None: more than half of the cases were not broken
    low: float | None
    high: float | None
    broken: int
    n: int


class Targeted(_Strict):
    """One organ made to disappear (share of its reference volume that is left) or to appear (share of the volume
    predicted on the clean image).
    """

    model: str
    attack: str
    target: str
    eps: float | None
    share: Estimate | None
    dice: Estimate | None
    n: int
    left_out: int  # nothing to divide by


class Incomplete(_Strict):
    """A case that lacks records which other cases of the same model have."""

    case: str
    model: str
    lacking: list[str]  # empty: it has no record at all
    failed: bool


class Summary(_Strict):
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


class Group(NamedTuple):
    """What the records of a condition have in common."""

    model: str
    kind: str
    attack: str
    eps: float | None
    severity: int | None

    def __str__(self) -> str:
        budget = "" if self.eps is None else f" at {self.eps:g}"
        return self.attack + budget + ("" if self.severity is None else f", severity {self.severity}")


Groups = dict[Group, dict[str, Record]]


def group_records(records: Iterable[Record]) -> Groups:
    """Records by condition and case, in their order; ``worst`` is not in it."""
    groups: Groups = {}
    for r in records:
        groups.setdefault(Group(r.model, r.kind, r.attack, r.eps, r.severity), {})[r.case] = r
    return groups


def worst_groups(groups: Groups) -> tuple[Groups, dict[Group, set[str]]]:
    """Per model and eps, of each case the record of the attack that leaves the lowest Dice; and the cases that lack an
    attack which other cases or models have.
    """
    everyones: dict[float, set[str]] = defaultdict(set)
    for group in groups:
        if group.kind in WORST_OF and group.kind != "transfer" and group.eps is not None:
            everyones[group.eps].add(group.attack)
    found: dict[tuple[str, float], dict[str, dict[str, Record]]] = defaultdict(dict)
    for group, records in groups.items():
        if group.kind in WORST_OF and group.eps is not None:
            found[group.model, group.eps][group.attack] = records
    worst: Groups = {}
    partial: dict[Group, set[str]] = {}
    for model, eps in sorted(found, key=lambda key: (list(dict.fromkeys(m for m, _ in found)).index(key[0]), key[1])):
        attacks = found[model, eps]
        chosen: dict[str, Record] = {}
        for case in dict.fromkeys(case for records in attacks.values() for case in records):
            there = [records[case] for records in attacks.values() if case in records]
            chosen[case] = min(there, key=lambda r: math.inf if r.dice is None else r.dice)
        group = Group(model, WORST, WORST, eps, None)
        worst[group] = chosen
        expected = attacks.keys() | everyones[eps]
        partial[group] = {case for case in chosen if any(case not in attacks.get(name, {}) for name in expected)}
    return worst, partial


def clean_dice(groups: Groups, model: str) -> dict[str, float]:
    """Dice of each case on the unchanged image, where it has one."""
    records = groups.get(Group(model, "clean", "clean", None, None), {})
    return {case: record.dice for case, record in records.items() if record.dice is not None}


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
            _condition(run, group, members, clean.get(group.model, {}), len(partial.get(group, ())))
            for group, members in everything.items()
        ],
        areas=_areas(everything, clean),
        breaking=_breaking(groups),
        targeted=_targeted(groups),
        comparisons=comparisons([model.name for model in run.models], _dice_of_groups(everything, partial)),
        clean_costs=clean_costs([model.name for model in run.models], clean),
        saved=saved_files(records),
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


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _condition(
    run: Run, group: Group, members: Mapping[str, Record], clean: Mapping[str, float], partial: int
) -> Condition:
    records = list(members.values())
    classes = {name: _class([r.classes[name] for r in records if name in r.classes]) for name in run.classes}
    pooled = _present(summary.pooled_dice for summary in classes.values())
    budgets = _present(r.eps_network for r in records)
    usable = [r for r in records if r.dice is not None and clean.get(r.case, 0.0) > 0]
    broken = sum((r.dice or 0.0) < run.settings.broken_below * clean[r.case] for r in usable)
    attacked = group.kind != "clean"
    return Condition(
        **group._asdict(),
        n=len(records),
        undefined=sum(r.dice is None for r in records),
        missing=0 if group.kind == "targeted" else len(run.cases) - len(records),
        partial=partial,
        eps_network=median(budgets),
        eps_network_range=(min(budgets), max(budgets)) if budgets else None,
        dice=estimate(r.dice for r in records),
        nsd=estimate(r.nsd for r in records),
        hd95_mm=estimate(r.hd95_mm for r in records),
        pooled_dice=mean(pooled),
        slice_dice=estimate(None if r.slice_dice is None else r.slice_dice.mean for r in records),
        classes=classes,
        success=Estimate.of(wilson(broken, len(usable))) if attacked else None,
        success_left_out=len(records) - len(usable) if attacked else 0,
        size=_size(records),
    )


def _class(items: Sequence[ClassMetrics]) -> ClassSummary:
    counts = [[getattr(item, name) for item in items] for name in ("tp", "fp", "fn")]
    return ClassSummary(
        dice=estimate(item.dice for item in items),
        nsd=estimate(item.nsd for item in items),
        hd95_mm=estimate(item.hd95_mm for item in items),
        pooled_dice=pooled_dice(*counts),
        volume_error_ml=mean([item.volume_error_ml for item in items if item.state != "both_empty"]),
        states=dict(sorted(Counter(item.state for item in items).items())),
    )


def _size(records: Sequence[Record]) -> SizeSummary | None:
    sizes = [r.size for r in records if r.size is not None]
    if not sizes:
        return None

    def average(get: Callable[[Any], float | None]) -> float | None:
        return mean(_present(get(size) for size in sizes))

    return SizeSummary(
        rms=average(lambda s: s.rms) or 0.0,
        linf=average(lambda s: s.linf) or 0.0,
        l2=average(lambda s: s.l2) or 0.0,
        percent_rms=average(lambda s: mean(s.percent_rms)),
        native_rms=average(lambda s: mean(s.native_rms)),
        psnr_db=average(lambda s: s.psnr_db),
        ssim=average(lambda s: s.ssim),
    )


def _areas(groups: Groups, clean: Mapping[str, Mapping[str, float]]) -> list[Area]:
    curves: dict[tuple[str, str], dict[float, dict[str, Record]]] = defaultdict(dict)
    for group, records in groups.items():
        if group.eps is not None and group.kind in (*WORST_OF, "noise", WORST):
            curves[group.model, group.attack][group.eps] = records
    areas = []
    for (model, attack), by_eps in curves.items():
        eps = sorted(by_eps)
        values = []
        cases = list(dict.fromkeys(case for records in by_eps.values() for case in records))
        for case in cases:
            dice = [by_eps[e][case].dice if case in by_eps[e] else None for e in eps]
            present = _present([clean[model].get(case), *dice])
            if len(present) == len(eps) + 1:
                values.append(float(area_under_dice([0.0, *eps], present)))
        areas.append(Area(model=model, attack=attack, area=estimate(values), left_out=len(cases) - len(values)))
    return areas


def _breaking(groups: Groups) -> list[Breaking]:
    found = []
    for group, records in groups.items():
        if group.kind != "minimal":
            continue
        before = clean_dice(groups, group.model)
        # What has no clean Dice to lose is not robust.
        result = median_breaking(r.breaking_rms for case, r in records.items() if before.get(case, 0) > 0)
        if result is None:
            continue
        found.append(
            Breaking(
                model=group.model,
                attack=group.attack,
                median_rms=result.median,
                low=result.low,
                high=result.high,
                broken=result.broken,
                n=result.n,
            )
        )
    return found


def _targeted(groups: Groups) -> list[Targeted]:
    found = []
    for group, records in groups.items():
        if group.kind != "targeted":
            continue
        goal, _, target = group.attack.partition(":")
        before = groups.get(Group(group.model, "clean", "clean", None, None), {})
        shares = []
        for case, record in records.items():
            if target not in record.classes:
                continue
            now = record.classes[target]
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
                share=estimate(shares),
                dice=estimate(r.classes[target].dice for r in records.values() if target in r.classes),
                n=len(records),
                left_out=len(records) - len(shares),
            )
        )
    return found


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
