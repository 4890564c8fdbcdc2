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
