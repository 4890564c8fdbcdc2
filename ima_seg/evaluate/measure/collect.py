"""The folders of an evaluation, read and merged: what the summary and the report start from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ima_seg.errors import UserError
from ima_seg.evaluate.records import Failure, Record, parse, read_lines
from ima_seg.evaluate.run import ModelInfo, Run

#: Fields of a record in which two computations of the same thing may differ.
_VARYING = {"seconds", "metric_seconds", "panel"}


@dataclass
class Evaluation:
    """One evaluation, merged from its parts."""

    run: Run  # settings and circumstances; the models and cases of all folders, in their order
    records: list[Record]  # without duplicates
    failures: list[Failure]  # less those that a later attempt completed
    panels: dict[tuple[Any, ...], Path] = field(default_factory=dict)  # by the key of the record
    duplicates: int = 0  # how many records were there twice; the first was kept
    differing: list[tuple[Any, ...]] = field(default_factory=list)  # keys of those that differ in more than their times
    others: list[Run] = field(default_factory=list)  # of further folders and of parts, for the circumstances
    damaged: list[str] = field(default_factory=list)  # file, line and fault of unreadable lines, if anything is missing
    left_out: dict[str, int] = field(default_factory=dict)  # records of cases or conditions that run.json lacks


def read_run(folder: Path, name: str = "run.json") -> Run:
    """``run.json`` of a folder, or that of one part.

    Raises:
        UserError: there is none, or it is no valid one.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} does not exist: {folder} is not the output folder of an evaluation")
    return parse(path.read_bytes(), Run, str(path))


def collect(folders: Sequence[Path]) -> Evaluation:
    """Read and merge the evaluations in ``folders``, each with any number of parts.

    Raises:
        UserError: no folder, no records, or folders that do not belong together.
    """
    folders = list(dict.fromkeys(folders))
    if not folders:
        raise UserError("no folder to report on; name at least one output folder of an evaluation")
    names = ", ".join(map(str, folders))
    runs = [read_run(folder) for folder in folders]
    run = _merge(folders, runs)
    parts = [read_run(folder, path.name) for folder in folders for path in sorted(folder.glob("run.part-*.json"))]
    result = Evaluation(run, [], [], others=[*runs[1:], *parts])
    position = {case: i for i, case in enumerate(run.cases)}
    models = {model.name for model in run.models}
    seen: dict[tuple[Any, ...], Record] = {}
    for folder in folders:
        for record in read_lines(sorted(folder.glob("records*.jsonl")), Record, result.damaged):
            if foreign := _foreign(run, models, position, record):
                result.left_out[foreign] = result.left_out.get(foreign, 0) + 1
                continue
            known = seen.setdefault(record.key, record)
            if known is not record:
                result.duplicates += 1
                same = known.model_dump(exclude=_VARYING) == record.model_dump(exclude=_VARYING)
                if not same and record.key not in result.differing:
                    result.differing.append(record.key)
            elif record.panel is not None:
                result.panels[record.key] = folder / record.panel
    result.records = _in_order(run, position, seen.values())
    whole = complete(run, result.records)
    for folder in folders:
        for failure in read_lines(sorted(folder.glob("failures*.jsonl")), Failure, result.damaged):
            later = all((failure.case, model) in whole for model in models if failure.model in (None, model))
            if failure not in result.failures and not later:
                result.failures.append(failure)
    if not (seen or result.failures or result.damaged):
        there = f"those there are of {', '.join(result.left_out)}, which run.json lacks" if result.left_out else ""
        raise UserError(f"no records in {names}: {there or 'there is no records*.jsonl, or nothing was evaluated yet'}")
    if run.conditions and all((case, model) in whole for case in run.cases for model in models):
        result.damaged.clear()  # a later line says it again
    result.failures.sort(key=lambda f: (position.get(f.case, len(position)), f.case, f.model or "", f.message))
    return result


def _foreign(run: Run, models: Container[str], cases: Container[str], record: Record) -> str:
    """What of a record is not of this run: a model, a case that left the input, or a condition; empty if all is."""
    if record.model not in models:
        return f"model {record.model}"
    if record.case not in cases:
        return f"case {record.case}"
    known = run.conditions.get(record.model)
    return "" if not known or record.key[2:] in known else f"{record.attack} at {record.eps or record.severity}"


def complete(run: Run, records: Iterable[Record]) -> set[tuple[str, str]]:
    """(case, model) with every record that the settings ask for."""
    found: dict[tuple[str, str], set[tuple[str, float | None, int | None]]] = defaultdict(set)
    for record in records:
        found[record.case, record.model].add(record.key[2:])
    return {key for key, there in found.items() if there.issuperset(run.conditions.get(key[1], ()))}


def _merge(folders: Sequence[Path], runs: Sequence[Run]) -> Run:
    """The first run with the models, cases and conditions of all; refuses those that do not belong together."""
    models: dict[str, tuple[Path, ModelInfo]] = {}
    cases: dict[str, tuple[Path, Run]] = {}
    conditions: dict[str, list[tuple[str, float | None, int | None]]] = {}
    for folder, run in zip(folders, runs, strict=True):
        mine, theirs = (
            r.settings.model_dump() | r.model_dump(include={"dataset", "classes", "channels"}) for r in (runs[0], run)
        )
        different = "; ".join(f"{key}: {mine[key]!r} and {theirs[key]!r}" for key in mine if mine[key] != theirs[key])
        if different:
            raise UserError(
                f"{folders[0]} and {folder} were evaluated differently ({different}) and cannot share a report; "
                "make one report of each"
            )
        for case in run.cases:
            place, other = cases.setdefault(case, (folder, run))
            if (run.images, run.labels) != (other.images, other.labels):
                raise UserError(
                    f"{place} and {folder} both hold case {case!r}, but from other folders of images or labels; "
                    "make one report of each"
                )
        for model in run.models:
            place, known = models.setdefault(model.name, (folder, model))
            if known.sd != model.sd:
                raise UserError(
                    f"sizes of model {model.name!r} are in other units in {place} ({known.sd}) than in {folder} "
                    f"({model.sd}); one was evaluated by an older version, evaluate it again"
                )
            if known.sha256 != model.sha256:
                raise UserError(
                    f"model {model.name!r} of {place} and that of {folder} have different hashes: they are two models; "
                    "make one report of each folder, or evaluate them again under different names"
                )
        conditions = run.conditions | conditions
    update = {"models": [model for _, model in models.values()], "cases": list(cases), "conditions": conditions}
    return runs[0].model_copy(update=update)


def _in_order(run: Run, cases: Mapping[str, int], records: Iterable[Record]) -> list[Record]:
    """By model, attack, budget and case, so that the report does not depend on the order of the work."""
    models = {model.name: i for i, model in enumerate(run.models)}
    attacks = {name: i for i, name in enumerate(["clean", *run.settings.attacks])}
    return sorted(
        records,
        key=lambda r: (
            models[r.model],
            attacks.get(r.attack.split(":")[0], len(attacks)),
            r.attack,
            -1.0 if r.eps is None else r.eps,
            r.severity or 0,
            cases[r.case],
            str(r.key),
        ),
    )
