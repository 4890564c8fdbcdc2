"""Sanity checks of an evaluation: whether its attacks did what attacks do. Each answers with its numbers.

One file: its sentences belong beside the checks that fill them.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

from ima_seg.evaluate.measure.collect import Evaluation
from ima_seg.evaluate.measure.groups import WORST, WORST_OF, Group, group_records
from ima_seg.evaluate.measure.statistics import mean
from ima_seg.evaluate.measure.summary import Summary
from ima_seg.evaluate.records import Disk, Record, Size
from ima_seg.evaluate.report.words import number

Status = Literal["PASS", "WARN", "SKIP"]
#: Dice by case, of each attack at each budget.
Points = dict[Group, dict[str, float]]

#: Differences of mean Dice below this are noise to every check.
TOLERANCE = 0.01
FLOOR = 0.1
#: Rounding in another order; what is larger comes from nondeterministic kernels.
REPEATABLE = 1e-4
FEW_CASES = 20
SHOWN = 4

#: Name of each check -> how it warns (what is bad follows), passes, and says that there was nothing to look at. Of the
#: fields ``share`` is "2 of 8", ``total`` the 8, ``number`` the check's own number, and ``note`` its remark.
SENTENCES = {
    "Iterative attacks beat single-step attacks": ("iterative attacks", "single-step attacks"),
    "A larger eps never helps the model": (
        "In {share} steps of eps the mean Dice rises",
        f"In none of {{total}} steps to a larger eps does the mean Dice rise by more than {TOLERANCE}.",
        "No attack was run at two values of eps.",
    ),
    "A large eps breaks every model": (
        "The largest eps does not break {share} models; larger eps are needed to tell robustness from a broken attack. "
        f"Lowest mean Dice, expected below {FLOOR}",
        f"Lowest mean Dice of the worst attack: {{number}}; all are below {FLOOR}.",
        "No attack with a budget was run.",
    ),
    "More steps would not help the attack": (
        f"In {{share}} conditions the last tenth of the steps still lowers the mean Dice by {TOLERANCE} or more; run "
        "more steps",
        "In all {total} conditions the last tenth of the steps changes the mean Dice by less than "
        f"{TOLERANCE} (at most {{number}}).",
        "No white-box attack of ten or more steps recorded its course.",
    ),
    "White box beats attacks without gradients": ("the strongest white-box attacks", "black-box attacks"),
    "White box beats transfer": ("the strongest white-box attacks", "transferred perturbations"),
    "White box beats random noise": ("white-box attacks", "random noise"),
    "Transfer beats random noise": ("transferred perturbations", "random noise"),
    "Gradients are not zero": (
        "{note}",
        "On average over {total} records {number}.",
        "No attack recorded its gradients.",
    ),
    "The budget is kept": (
        "{share} perturbations exceed their budget (size / eps)",
        "All {total} perturbations are within their budget; largest size / eps {number}.",
        "No record has both a budget and a size.",
    ),
    "Saved files hold the same perturbation": (
        "{share} saved perturbations differ in size by more than 1 % from the record, as rounding to the file's number "
        "format does to small ones",
        "All {total} saved perturbations have the recorded size within 1 % (largest error {number}).",
        "No adversarial files were saved.",
    ),
    "Saved files give the same Dice": (
        f"{{share}} saved files give a Dice more than {TOLERANCE} from the record's{{note}}",
        f"All {{total}} saved files give the recorded Dice within {TOLERANCE} (largest difference {{number}}){{note}}.",
        "No adversarial files were saved and predicted again{note}.",
    ),
    "The device computes the same twice": (
        "Equal seeds will not give equal perturbations on this device",
        "{number} ({total} computed twice).",
        "No gradient was computed twice.",
    ),
    "Repeated computations agree": (
        "{share} records that were computed twice have different results (the first is used)",
        "{total} records were computed twice with equal results.",
        "No record was computed twice.",
    ),
    "All parts ran on the same software and device": (
        "The folders differ",
        "All {number} folders have equal versions and devices.",
        "There is only one run.json.",
    ),
    "No case is of the training set": (
        "{share} cases have the ids of cases that a model was trained on, or that lie in its training set; their "
        "numbers say little about new cases",
        "None of {total} cases is known to be of a model's training set.",
        "Nothing tells which cases the models were trained on.",
    ),
    "Every line could be read": (
        "{share} lines could not be read, and what they said is missing",
        "No line is missing.",
        "",
    ),
    "All records are of this run": (
        "Records of cases that are no longer in the input, or of other conditions, are left out",
        "All records belong to cases and conditions of this run.",
        "",
    ),
    "Enough cases": ("Intervals are wide", "{number}.", ""),
    "All cases are complete": (
        "Records are missing in {share} pairs of case and model",
        "Every case that did not fail has all records of its model.",
        "",
    ),
    "No case failed": ("{share} cases failed and are missing from means", "None of {total} cases failed.", ""),
}
STRONGEST = "the strongest white-box attacks"
GROUPS: dict[str, Callable[[Group], bool]] = {
    "iterative attacks": lambda c: c.attack in ("ifgsm", "pgd"),
    "single-step attacks": lambda c: c.attack == "fgsm",
    "white-box attacks": lambda c: c.kind == "white",
    STRONGEST: lambda c: c.kind == "white",
    "black-box attacks": lambda c: c.kind == "black",
    "transferred perturbations": lambda c: c.kind == "transfer",
    "random noise": lambda c: c.kind == "noise",
}
#: Those of the checks that name two groups of attacks: of one model and eps the first must leave no more Dice.
ORDERS = (
    "In {share} comparisons %s leave more Dice than %s",
    "In all {total} comparisons %s leave no more Dice than %s; the closest difference is {number} Dice.",
    "%s and %s were not both run at the same eps.",
)


@dataclass(frozen=True)
class Flag:
    """The answer of one check."""

    name: str
    status: Status
    sentence: str


class _Found(NamedTuple):
    """What a check looked at and what is wrong with it; see :data:`SENTENCES`."""

    total: int
    bad: Sequence[str]
    number: str = ""
    note: str = ""


def _flag(name: str, found: _Found) -> Flag:
    sentences = SENTENCES[name]
    if len(sentences) == 2:
        sentences = tuple(sentence % sentences for sentence in ORDERS)
    status: Status = "SKIP" if not found.total else "WARN" if found.bad else "PASS"
    sentence = dict(zip(("WARN", "PASS", "SKIP"), sentences, strict=True))[status]
    sentence = sentence.format(**found._asdict(), share=f"{len(found.bad)} of {found.total}")
    if status == "WARN":
        more = f"; and {len(found.bad) - SHOWN} more" if len(found.bad) > SHOWN else ""
        sentence += f": {'; '.join(found.bad[:SHOWN])}{more}."
    return Flag(name, status, sentence)


def _points(records: Sequence[Record]) -> Points:
    groups = {g: members for g, members in group_records(records).items() if g.eps is not None}
    points = {g: {r.case: r.dice for r in there.values() if r.dice is not None} for g, there in groups.items()}
    return {group: dice for group, dice in points.items() if dice}


def _falls(points: Points, pairs: Iterable[tuple[Group, Group]]) -> _Found:
    """Whether the first of each pair leaves no more Dice than the second, over the cases that both have."""
    differences, bad = [], []
    for a, b in pairs:
        common = points[a].keys() & points[b].keys()
        if common:
            x, y = (fmean(points[group][case] for case in common) for group in (a, b))
            differences.append(x - y)
            if x > y + TOLERANCE:
                bad.append(f"{a.model}: {a.attack} at {a.eps:g} {x:.3f}, {b.attack} at {b.eps:g} {y:.3f}")
    return _Found(len(differences), bad, number(max(differences, default=None)))


def _members(points: Points, words: str) -> list[Group]:
    """A group of attacks; of the strongest one for each model and eps."""
    found = [group for group in points if GROUPS[words](group)]
    if words == STRONGEST:  # a weak white-box attack beside a strong one does no harm
        found.sort(key=lambda group: fmean(points[group].values()), reverse=True)
        return list({(group.model, group.eps): group for group in found}.values())
    return found


def _ordered(points: Points, name: str) -> _Found:
    strong, weak = (_members(points, words) for words in SENTENCES[name])
    return _falls(points, ((a, b) for a in strong for b in weak if (a.model, a.eps) == (b.model, b.eps)))


def _monotone(points: Points) -> _Found:
    curves: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in sorted(points, key=lambda group: group.eps or 0.0):
        if group.kind in (*WORST_OF, "noise"):
            curves[group.model, group.attack].append(group)
    return _falls(points, ((b, a) for curve in curves.values() for a, b in itertools.pairwise(curve)))


def _reaches_floor(summary: Summary) -> _Found:
    worst = [(c.dice.estimate, c) for c in summary.conditions if c.attack == WORST and c.dice is not None]
    lowest = {c.model: (dice, c) for dice, c in sorted(worst, key=lambda item: item[0], reverse=True)}
    numbers = {f"{model} {dice:.3f} at eps {c.eps:g}": dice for model, (dice, c) in lowest.items()}
    return _Found(len(numbers), [words for words, dice in numbers.items() if dice >= FLOOR], "; ".join(numbers))


def _converged(records: Sequence[Record]) -> _Found:
    gains: dict[str, list[float]] = defaultdict(list)
    for r in records:
        if r.kind == "white" and len(r.trace) >= 10 and r.eps is not None:
            tail = max(1, round(0.1 * (len(r.trace) - 1)))
            gains[f"{r.model}, {r.attack} at {r.eps:g}"].append(r.trace[-1 - tail] - r.trace[-1])
    means = {where: fmean(values) for where, values in gains.items()}
    bad = [f"{where}: {gain:.3f}" for where, gain in means.items() if abs(gain) >= TOLERANCE]
    return _Found(len(means), bad, f"{max(map(abs, means.values()), default=0):.4f}")


def _gradients(records: Sequence[Record]) -> _Found:
    shares = [r.zero_gradient for r in records if r.kind == "white" and r.zero_gradient is not None]
    average, most = mean(shares) or 0.0, max(shares, default=0.0)
    numbers = f"{100 * average:.2f} % of the gradient passes were exactly zero, at most {100 * most:.2f} %"
    masked = "Gradients are masked, and white-box results overstate robustness"
    weak = "White-box attacks may be a little weak (expected are less than 1 %)"
    return _Found(len(shares), [numbers] if average >= 0.01 else [], numbers, masked if average > 0.1 else weak)


def _size(record: Record, size: Size | Disk) -> float:
    """In the norm of the budget."""
    return size.linf if record.norm == "linf" else size.rms


def _largest(errors: Sequence[tuple[float, Record]], limit: float, form: str, note: str = "") -> _Found:
    """Whether no record has an error above ``limit``."""
    bad = [f"{r.case}, {r.model}, {r.attack} at {r.eps or 0:g}: {form % error}" for error, r in errors if error > limit]
    return _Found(len(errors), bad, form % max((error for error, _ in errors), default=0.0), note)


def _budget(records: Sequence[Record]) -> _Found:
    ratios = [(_size(r, r.size) / r.eps_network, r) for r in records if r.eps_network and r.size is not None]
    return _largest(ratios, 1 + 1e-3, "%.4f")


def _same_numbers(disk: Disk) -> bool:
    """Whether the file can hold the very perturbation that was found."""
    return not (disk.resampled or disk.rounded)


def _disk_size(records: Sequence[Record]) -> _Found:
    errors = [
        (100 * abs(_size(r, r.disk) / size - 1), r)
        for r in records
        if r.disk is not None and _same_numbers(r.disk) and r.size is not None and (size := _size(r, r.size))
    ]
    return _largest(errors, 1.0, "%.2f %%")


def _disk_dice(records: Sequence[Record]) -> _Found:
    saved = [(r, r.disk) for r in records if r.disk is not None]
    others = sum(not _same_numbers(disk) for _, disk in saved)
    errors = [
        (abs(disk.dice - r.dice), r)
        for r, disk in saved
        if _same_numbers(disk) and disk.dice is not None and r.dice is not None
    ]
    note = f"; {others} records of images that were resampled or rounded are not compared" if others else ""
    return _largest(errors, TOLERANCE, "%.4f", note)


def _repeats(records: Sequence[Record]) -> _Found:
    found = [r.repeat_difference for r in records if r.repeat_difference is not None]
    most = max(found, default=0.0)
    numbers = f"The same input gradient, computed twice, differs by at most {100 * most:.2g} % of its largest value"
    return _Found(len(found), [numbers] if most > REPEATABLE else [], numbers)


def _same_versions(evaluation: Evaluation) -> _Found:
    first = evaluation.run.versions | {"": evaluation.run.device}
    different: dict[str, None] = {}
    for other in evaluation.others:
        theirs = other.versions | {"": other.device}
        for package in sorted(first.keys() | theirs.keys(), reverse=True):
            pair = [versions.get(package, "absent") for versions in (first, theirs)]
            if pair[0] != pair[1]:
                different[f"{package} {' and '.join(pair)}".strip()] = None
    return _Found(len(evaluation.others), list(different), str(len(evaluation.others) + 1))


def _leaks(evaluation: Evaluation) -> _Found:
    known: dict[str, list[str]] = defaultdict(list)
    models = [model for run in (evaluation.run, *evaluation.others) for model in run.models]
    for model in models:
        for case, reason in (model.training_cases or {}).items():
            known[case].append(f"{model.name}: {reason}")
    told = any(model.training_cases is not None for model in models)
    bad = [f"{case} ({', '.join(dict.fromkeys(reasons))})" for case, reasons in known.items()]
    return _Found(len(evaluation.run.cases) if told else 0, bad)


def _enough_cases(summary: Summary) -> _Found:
    n = min((c.n for c in summary.conditions if c.kind == "clean"), default=0)
    few = [f"{n} cases, and {FEW_CASES} or more are needed to rank models"] if n < FEW_CASES else []
    return _Found(max(n, 1), few, f"{n} cases")


def _complete(summary: Summary) -> _Found:
    lacking = [
        f"{i.case}, {i.model}: {f'{len(i.lacking)} records' if i.lacking else 'everything'}"
        for i in summary.incomplete
        if not i.failed
    ]
    return _Found(max(summary.cases * len({c.model for c in summary.conditions}), 1), lacking)


def check(evaluation: Evaluation, summary: Summary) -> list[Flag]:
    """All checks, in the order in which the report lists them."""
    records, points = evaluation.records, _points(evaluation.records)
    found = {
        "A larger eps never helps the model": _monotone(points),
        "A large eps breaks every model": _reaches_floor(summary),
        "More steps would not help the attack": _converged(records),
        "Gradients are not zero": _gradients(records),
        "The budget is kept": _budget(records),
        "Saved files hold the same perturbation": _disk_size(records),
        "Saved files give the same Dice": _disk_dice(records),
        "The device computes the same twice": _repeats(records),
        "Repeated computations agree": _Found(
            evaluation.duplicates, [", ".join(map(str, key[:3])) for key in evaluation.differing]
        ),
        "All parts ran on the same software and device": _same_versions(evaluation),
        "No case is of the training set": _leaks(evaluation),
        "Every line could be read": _Found(
            len(records) + evaluation.duplicates + len(evaluation.damaged), evaluation.damaged
        ),
        "All records are of this run": _Found(
            max(len(records), 1), [f"{what} ({count})" for what, count in evaluation.left_out.items()]
        ),
        "Enough cases": _enough_cases(summary),
        "All cases are complete": _complete(summary),
        "No case failed": _Found(summary.cases, list(dict.fromkeys(f.case for f in evaluation.failures))),
    }
    return [_flag(name, found[name] if name in found else _ordered(points, name)) for name in SENTENCES]
