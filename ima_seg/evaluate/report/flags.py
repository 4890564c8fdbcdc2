"""Sanity checks of an evaluation: whether its attacks did what attacks do. Each answers with its numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ima_seg.evaluate.measure.collect import Evaluation
from ima_seg.evaluate.measure.groups import WORST, WORST_OF
from ima_seg.evaluate.measure.statistics import mean
from ima_seg.evaluate.measure.summary import Condition, Summary
from ima_seg.evaluate.records import Record
from ima_seg.evaluate.report.words import number

Status = Literal["PASS", "WARN", "SKIP"]

#: Differences of mean Dice below this are noise to every check.
TOLERANCE = 0.01
SINGLE_STEP = ("fgsm",)
ITERATIVE = ("ifgsm", "pgd")
FLOOR = 0.1
#: Rounding in another order; what is larger comes from nondeterministic kernels.
REPEATABLE = 1e-4
FEW_CASES = 20
SHOWN = 4


@dataclass(frozen=True)
class Flag:
    """The answer of one check."""

    name: str
    status: Status
    sentence: str


def _listing(items: Sequence[str]) -> str:
    more = f"; and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return "; ".join(items[:SHOWN]) + more


def _dice(condition: Condition) -> float:
    return math.nan if condition.dice is None else condition.dice.estimate


class _Table:
    """Conditions with a budget and a Dice, by model, eps and attack; means of two are compared over common cases."""

    def __init__(self, summary: Summary, records: Sequence[Record]) -> None:
        self.conditions = [c for c in summary.conditions if c.eps is not None and c.dice is not None]
        self._values: dict[tuple[str, str, float | None], dict[str, float]] = {}
        for r in records:
            if r.dice is not None:
                self._values.setdefault((r.model, r.attack, r.eps), {})[r.case] = r.dice

    def pairs(self) -> Iterable[tuple[Condition, Condition]]:
        """All ordered pairs of one model and eps."""
        for a in self.conditions:
            for b in self.conditions:
                if a is not b and (a.model, a.eps) == (b.model, b.eps):
                    yield a, b

    def means(self, a: Condition, b: Condition) -> tuple[float, float] | None:
        """Mean Dice of both over the cases that both have."""
        first, second = (self._values.get((c.model, c.attack, c.eps), {}) for c in (a, b))
        common = [case for case in first if case in second]
        if not common:
            return None
        return sum(first[c] for c in common) / len(common), sum(second[c] for c in common) / len(common)


def _ordered(
    name: str,
    table: _Table,
    stronger: Callable[[Condition], bool],
    weaker: Callable[[Condition], bool],
    words: tuple[str, str],
) -> Flag:
    """Whether each ``stronger`` condition leaves no more Dice than each ``weaker`` one of the same model and eps."""
    bad, count, largest = [], 0, -math.inf
    for a, b in table.pairs():
        if not (stronger(a) and weaker(b)):
            continue
        both = table.means(a, b)
        if both is None:
            continue
        count += 1
        largest = max(largest, both[0] - both[1])
        if both[0] > both[1] + TOLERANCE:
            bad.append(f"{a.model}, eps {a.eps:g}: {a.attack} {both[0]:.3f}, {b.attack} {both[1]:.3f}")
    if not count:
        return Flag(name, "SKIP", f"{words[0]} and {words[1]} were not both run at the same eps.")
    if bad:
        return Flag(
            name,
            "WARN",
            f"In {len(bad)} of {count} comparisons {words[0]} leave more Dice than {words[1]}: {_listing(bad)}.",
        )
    margin = f"the closest difference is {number(largest)} Dice"
    return Flag(name, "PASS", f"In all {count} comparisons {words[0]} leave no more Dice than {words[1]}; {margin}.")


def _single_step(table: _Table) -> Flag:
    return _ordered(
        "Iterative attacks beat single-step attacks",
        table,
        lambda c: c.attack in ITERATIVE,
        lambda c: c.attack in SINGLE_STEP,
        ("iterative attacks", "single-step attacks"),
    )


def _beats_noise(table: _Table, kind: str, name: str, words: str) -> Flag:
    return _ordered(name, table, lambda c: c.kind == kind, lambda c: c.kind == "noise", (words, "random noise"))


def _best_against(name: str, table: _Table, other: str, words: str) -> Flag:
    # A weak white-box attack beside a strong one does no harm.
    best: dict[tuple[str, float | None], Condition] = {}
    for c in table.conditions:
        key = (c.model, c.eps)
        if c.kind == "white" and (key not in best or _dice(c) < _dice(best[key])):
            best[key] = c
    chosen = {id(c) for c in best.values()}
    words_of = ("the strongest white-box attacks", words)
    return _ordered(name, table, lambda c: id(c) in chosen, lambda c: c.kind == other, words_of)


def _monotone(table: _Table) -> Flag:
    name = "A larger eps never helps the model"
    curves: dict[tuple[str, str], list[Condition]] = {}
    for c in table.conditions:
        if c.kind in (*WORST_OF, "noise"):
            curves.setdefault((c.model, c.attack), []).append(c)
    bad, count = [], 0
    for (model, attack), curve in curves.items():
        curve.sort(key=lambda c: c.eps or 0.0)
        for a, b in itertools.pairwise(curve):
            both = table.means(a, b)
            if both is None:
                continue
            count += 1
            if both[1] > both[0] + TOLERANCE:
                bad.append(f"{model}, {attack}: {both[0]:.3f} at {a.eps:g}, {both[1]:.3f} at {b.eps:g}")
    if not count:
        return Flag(name, "SKIP", "No attack was run at two values of eps.")
    if bad:
        return Flag(name, "WARN", f"In {len(bad)} of {count} steps of eps the mean Dice rises: {_listing(bad)}.")
    return Flag(
        name, "PASS", f"In none of {count} steps to a larger eps does the mean Dice rise by more than {TOLERANCE}."
    )


def _reaches_floor(summary: Summary) -> Flag:
    name = "A large eps breaks every model"
    lowest: dict[str, Condition] = {}
    for c in summary.conditions:
        if c.attack == WORST and c.dice is not None and (c.model not in lowest or _dice(c) < _dice(lowest[c.model])):
            lowest[c.model] = c
    if not lowest:
        return Flag(name, "SKIP", "No attack with a budget was run.")
    numbers = "; ".join(f"{model} {_dice(c):.3f} at eps {c.eps:g}" for model, c in lowest.items())
    if any(not _dice(c) < FLOOR for c in lowest.values()):
        return Flag(
            name,
            "WARN",
            "The largest eps does not break the model; larger eps are needed to tell robustness from a broken attack. "
            f"Lowest mean Dice: {numbers}; expected below {FLOOR}.",
        )
    return Flag(name, "PASS", f"Lowest mean Dice of the worst attack: {numbers}; all are below {FLOOR}.")


def _converged(records: Sequence[Record]) -> Flag:
    name = "More steps would not help the attack"
    gains: dict[tuple[str, str, float | None], list[float]] = {}
    for r in records:
        if r.kind == "white" and len(r.trace) >= 10:
            tail = max(1, round(0.1 * (len(r.trace) - 1)))
            gains.setdefault((r.model, r.attack, r.eps), []).append(r.trace[-1 - tail] - r.trace[-1])
    if not gains:
        return Flag(name, "SKIP", "No white-box attack of ten or more steps recorded its course.")
    means = {key: sum(values) / len(values) for key, values in gains.items()}
    bad = [f"{m}, {a} at {e:g}: {g:.3f}" for (m, a, e), g in means.items() if abs(g) >= TOLERANCE and e is not None]
    if bad:
        return Flag(
            name,
            "WARN",
            f"In {len(bad)} of {len(means)} conditions the last tenth of the steps still lowers the mean Dice by "
            f"{TOLERANCE} or more; run more steps: {_listing(bad)}.",
        )
    return Flag(
        name,
        "PASS",
        f"In all {len(means)} conditions the last tenth of the steps changes the mean Dice by less than {TOLERANCE} "
        f"(at most {max(map(abs, means.values())):.4f}).",
    )


def _gradients(records: Sequence[Record]) -> Flag:
    name = "Gradients are not zero"
    shares = [r.zero_gradient for r in records if r.kind == "white" and r.zero_gradient is not None]
    average = mean(shares)
    if average is None:
        return Flag(name, "SKIP", "No attack recorded its gradients.")
    numbers = (
        f"On average over {len(shares)} records {100 * average:.2f} % of the gradient passes were exactly zero, "
        f"at most {100 * max(shares):.2f} %"
    )
    if average > 0.1:
        return Flag(name, "WARN", f"{numbers}: gradients are masked, and white-box results overstate robustness.")
    if average >= 0.01:
        return Flag(name, "WARN", f"{numbers}; expected are less than 1 %, so white-box attacks may be a little weak.")
    return Flag(name, "PASS", f"{numbers}.")


def _length(record: Record) -> float | None:
    """Size in the norm of the budget."""
    if record.size is None:
        return None
    return record.size.linf if record.norm == "linf" else record.size.rms


def _budget(records: Sequence[Record]) -> Flag:
    name = "The budget is kept"
    ratios = [(length / r.eps_network, r) for r in records if r.eps_network and (length := _length(r)) is not None]
    if not ratios:
        return Flag(name, "SKIP", "No record has both a budget and a size.")
    largest = max(ratio for ratio, _ in ratios)
    bad = [
        f"{r.case}, {r.model}, {r.attack} at {r.eps or r.eps_network:g}: {ratio:.4f}"
        for ratio, r in ratios
        if ratio > 1 + 1e-3
    ]
    if bad:
        return Flag(
            name,
            "WARN",
            f"{len(bad)} of {len(ratios)} perturbations exceed their budget (size / eps): {_listing(bad)}.",
        )
    return Flag(
        name, "PASS", f"All {len(ratios)} perturbations are within their budget; largest size / eps {largest:.4f}."
    )


def _disk_size(records: Sequence[Record]) -> Flag:
    name = "Saved files hold the same perturbation"
    saved = [
        (abs(disk / length - 1), r)
        for r in records
        if r.disk is not None
        and not r.disk.resampled
        and (length := _length(r))
        and (disk := r.disk.linf if r.norm == "linf" else r.disk.rms) >= 0
    ]
    if not saved:
        return Flag(name, "SKIP", "No adversarial files were saved.")
    largest = max(error for error, _ in saved)
    bad = [
        f"{r.case}, {r.model}, {r.attack} at {r.eps or 0:g}: {100 * error:.1f} %" for error, r in saved if error > 0.01
    ]
    if bad:
        return Flag(
            name,
            "WARN",
            f"{len(bad)} of {len(saved)} saved perturbations differ in size by more than 1 % from the record, as "
            f"rounding to the file's number format does to small ones: {_listing(bad)}.",
        )
    return Flag(
        name,
        "PASS",
        f"All {len(saved)} saved perturbations have the recorded size within 1 % (largest error "
        f"{100 * largest:.2f} %).",
    )


def _disk_dice(records: Sequence[Record]) -> Flag:
    name = "Saved files give the same Dice"
    saved = [
        (abs(r.disk.dice - r.dice), r)
        for r in records
        if r.disk is not None and not r.disk.resampled and r.disk.dice is not None and r.dice is not None
    ]
    resampled = sum(r.disk is not None and r.disk.resampled for r in records)
    note = f" {resampled} records of resampled images are not compared." if resampled else ""
    if not saved:
        return Flag(name, "SKIP", f"No adversarial files were saved and predicted again.{note}")
    largest = max(error for error, _ in saved)
    bad = [f"{r.case}, {r.model}, {r.attack} at {r.eps or 0:g}: {error:.3f}" for error, r in saved if error > TOLERANCE]
    if bad:
        return Flag(
            name,
            "WARN",
            f"{len(bad)} of {len(saved)} saved files give a Dice more than {TOLERANCE} from the record's: "
            f"{_listing(bad)}.{note}",
        )
    return Flag(
        name,
        "PASS",
        f"All {len(saved)} saved files give the recorded Dice within {TOLERANCE} (largest difference "
        f"{largest:.4f}).{note}",
    )


def _duplicates(evaluation: Evaluation) -> Flag:
    name = "Repeated computations agree"
    if not evaluation.duplicates:
        return Flag(name, "SKIP", "No record was computed twice.")
    if evaluation.differing:
        keys = [f"{key[0]}, {key[1]}, {key[2]}" for key in evaluation.differing]
        return Flag(
            name,
            "WARN",
            f"{len(evaluation.differing)} records were computed twice with different results (the first is used), of "
            f"{evaluation.duplicates} duplicates: {_listing(keys)}.",
        )
    return Flag(name, "PASS", f"{evaluation.duplicates} records were computed twice with equal results.")


def _repeats(records: Sequence[Record]) -> Flag:
    name = "The device computes the same twice"
    found = [r.repeat_difference for r in records if r.repeat_difference is not None]
    if not found:
        return Flag(name, "SKIP", "No gradient was computed twice.")
    largest = max(found)
    numbers = f"The same input gradient, computed twice, differs by at most {100 * largest:.2g} % of its largest value"
    if largest > REPEATABLE:
        return Flag(name, "WARN", f"{numbers}: equal seeds will not give equal perturbations on this device.")
    return Flag(name, "PASS", f"{numbers} ({len(found)} computed twice).")


def _same_versions(evaluation: Evaluation) -> Flag:
    name = "All parts ran on the same software and device"
    if not evaluation.others:
        return Flag(name, "SKIP", "There is only one run.json.")
    first = evaluation.run
    different: dict[str, None] = {}
    for other in evaluation.others:
        for package in sorted(first.versions.keys() | other.versions.keys()):
            mine, theirs = first.versions.get(package, "absent"), other.versions.get(package, "absent")
            if mine != theirs:
                different[f"{package} {mine} and {theirs}"] = None
        if first.device != other.device:
            different[f"{first.device} and {other.device}"] = None
    if different:
        return Flag(name, "WARN", f"The folders differ: {_listing(list(different))}.")
    return Flag(name, "PASS", f"All {len(evaluation.others) + 1} folders have equal versions and devices.")


def _enough_cases(summary: Summary) -> Flag:
    name = "Enough cases"
    counts = [c.n for c in summary.conditions if c.kind == "clean"]
    n = min(counts, default=0)
    if n < FEW_CASES:
        return Flag(name, "WARN", f"{n} cases: intervals are wide; {FEW_CASES} or more are needed to rank models.")
    return Flag(name, "PASS", f"{n} cases.")


def _complete(summary: Summary) -> Flag:
    name = "All cases are complete"
    lacking = [item for item in summary.incomplete if not item.failed]
    if not lacking:
        return Flag(name, "PASS", "Every case that did not fail has all records of its model.")
    total = summary.cases * len({c.model for c in summary.conditions})
    items = [f"{i.case}, {i.model}: {f'{len(i.lacking)} records' if i.lacking else 'everything'}" for i in lacking]
    return Flag(
        name, "WARN", f"Records are missing in {len(lacking)} of {total} pairs of case and model: {_listing(items)}."
    )


def _no_failures(evaluation: Evaluation, summary: Summary) -> Flag:
    name = "No case failed"
    failed: Mapping[str, None] = dict.fromkeys(f.case for f in evaluation.failures)
    if failed:
        return Flag(
            name,
            "WARN",
            f"{len(failed)} of {summary.cases} cases failed and are missing from means: {_listing(list(failed))}.",
        )
    return Flag(name, "PASS", f"None of {summary.cases} cases failed.")


def check(evaluation: Evaluation, summary: Summary) -> list[Flag]:
    """All checks, in the order in which the report lists them."""
    records = evaluation.records
    table = _Table(summary, records)
    return [
        _single_step(table),
        _monotone(table),
        _reaches_floor(summary),
        _converged(records),
        _best_against("White box beats attacks without gradients", table, "black", "black-box attacks"),
        _best_against("White box beats transfer", table, "transfer", "transferred perturbations"),
        _beats_noise(table, "white", "White box beats random noise", "white-box attacks"),
        _beats_noise(table, "transfer", "Transfer beats random noise", "transferred perturbations"),
        _gradients(records),
        _budget(records),
        _disk_size(records),
        _disk_dice(records),
        _repeats(records),
        _duplicates(evaluation),
        _same_versions(evaluation),
        _enough_cases(summary),
        _complete(summary),
        _no_failures(evaluation, summary),
    ]
