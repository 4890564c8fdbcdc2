"""Records by condition: the tables that the summary and the page are made from."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from ima_seg.evaluate.records import Record

#: Kinds of attacks of which the worst per case is taken.
WORST_OF = ("white", "black", "transfer")
#: Name of the pseudo-attack: per case the attack with the lowest Dice.
WORST = "worst"


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
    expected: dict[float, set[str]] = defaultdict(set)
    found: dict[str, dict[float, dict[str, list[Record]]]] = {}
    for group, records in groups.items():
        if group.kind in WORST_OF and group.eps is not None:
            if group.kind != "transfer":
                expected[group.eps].add(group.attack)
            cases = found.setdefault(group.model, {}).setdefault(group.eps, {})
            for case, record in records.items():
                cases.setdefault(case, []).append(record)
    worst: Groups = {}
    partial: dict[Group, set[str]] = {}
    for model, budgets in found.items():
        for eps, cases in sorted(budgets.items()):
            group = Group(model, WORST, WORST, eps, None)
            worst[group] = {
                case: min(there, key=lambda r: math.inf if r.dice is None else r.dice) for case, there in cases.items()
            }
            wanted = expected[eps] | {r.attack for there in cases.values() for r in there}
            partial[group] = {case for case, there in cases.items() if wanted - {r.attack for r in there}}
    return worst, partial


def clean_dice(groups: Groups, model: str) -> dict[str, float]:
    """Dice of each case on the unchanged image, where it has one."""
    records = groups.get(Group(model, "clean", "clean", None, None), {})
    return {case: record.dice for case, record in records.items() if record.dice is not None}
