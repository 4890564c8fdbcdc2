"""The folders of an evaluation, read and merged: what the summary and the report start from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ima_seg.errors import UserError
from ima_seg.evaluate.records import Failure, Record, read_lines
from ima_seg.evaluate.run import ModelInfo, Run

#: Fields of a record in which two computations of the same thing always differ.
_TIMES = ("seconds", "metric_seconds")


@dataclass
class Evaluation:
    """One evaluation, merged from its parts.

    Attributes:
        run: settings and circumstances; the models and cases of all folders, in their order.
        records: without duplicates.
        failures: cases that could not be evaluated, less those that a later attempt completed.
        panels: panel file of each record that has one, by its key.
        duplicates: how many records were there twice; the first was kept.
        differing: keys of the records whose duplicates differ in more than their run time.
        others: run.json of the second and further folders, and of parts, for the circumstances.
    """

    run: Run
    records: list[Record]
    failures: list[Failure]
    panels: dict[tuple[Any, ...], Path] = field(default_factory=dict)
    duplicates: int = 0
    differing: list[tuple[Any, ...]] = field(default_factory=list)
    others: list[Run] = field(default_factory=list)


def read_run(folder: Path, name: str = "run.json") -> Run:
    """``run.json`` of a folder, or that of one part.

    Raises:
        UserError: there is none, or it is no valid one.
    """
    path = folder / name
    try:
        return Run.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {folder} is not the output folder of an evaluation") from None
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not valid ({str(error).splitlines()[0]}); the file was changed by hand or written by another "
            "version, evaluate again"
        ) from None


def collect(folders: Sequence[Path]) -> Evaluation:
    """Read and merge the evaluations in ``folders``, each with any number of parts.

    Raises:
        UserError: no folder, no records, or folders that do not belong together.
    """
    folders = list(dict.fromkeys(folders))
    if not folders:
        raise UserError("no folder to report on; name at least one output folder of an evaluation")
    runs = [read_run(folder) for folder in folders]
    for folder, run in zip(folders[1:], runs[1:], strict=True):
        _require_same(folders[0], runs[0], folder, run)
    merged = _merge_runs(folders, runs)
    parts = [read_run(folder, path.name) for folder in folders for path in sorted(folder.glob("run.part-*.json"))]
    result = Evaluation(merged, [], [], others=[*runs[1:], *parts])
    seen: dict[tuple[Any, ...], Record] = {}
    for folder in folders:
        for record in read_lines(sorted(folder.glob("records*.jsonl")), Record):
            if record.key in seen:
                result.duplicates += 1
                if _comparable(record) != _comparable(seen[record.key]) and record.key not in result.differing:
                    result.differing.append(record.key)
                continue
            seen[record.key] = record
            if record.panel is not None:
                result.panels[record.key] = folder / record.panel
    if not seen:
        raise UserError(f"no records in {_names(folders)}: there is no records*.jsonl, or nothing was evaluated yet")
    result.records = _in_order(merged, list(seen.values()))
    _require_known(folders, merged, result.records)
    complete = _complete(merged, result.records)
    for folder in folders:
        for failure in read_lines(sorted(folder.glob("failures*.jsonl")), Failure):
            models = {model.name for model in merged.models} if failure.model is None else {failure.model}
            later = all((failure.case, model) in complete for model in models)
            if failure not in result.failures and not later:
                result.failures.append(failure)
    position = {case: i for i, case in enumerate(merged.cases)}
    result.failures.sort(key=lambda f: (position.get(f.case, len(position)), f.case, f.model or "", f.message))
    return result


def _complete(run: Run, records: Sequence[Record]) -> set[tuple[str, str]]:
    """(case, model) with every record that the settings ask for."""
    found: dict[tuple[str, str], set[tuple[str, float | None, int | None]]] = {}
    for record in records:
        found.setdefault((record.case, record.model), set()).add((record.attack, record.eps, record.severity))
    return {key for key, there in found.items() if there >= set(run.conditions.get(key[1], ()))}


def _names(folders: Sequence[Path]) -> str:
    return ", ".join(str(folder) for folder in folders)


def _comparable(record: Record) -> dict[str, Any]:
    return record.model_dump(exclude={*_TIMES, "panel"})


def _require_same(first: Path, run: Run, second: Path, other: Run) -> None:
    mine, theirs = run.settings.model_dump(), other.settings.model_dump()
    different = [name for name in mine if mine[name] != theirs[name]]
    for name in ("dataset", "classes", "channels"):
        if getattr(run, name) != getattr(other, name):
            mine[name], theirs[name] = getattr(run, name), getattr(other, name)
            different.append(name)
    if different:
        values = "; ".join(f"{name}: {mine[name]!r} and {theirs[name]!r}" for name in different)
        raise UserError(
            f"{first} and {second} were evaluated differently ({values}) and cannot share a report; "
            "make one report of each"
        )
    shared = set(run.cases) & set(other.cases)
    if shared and (run.images, run.labels) != (other.images, other.labels):
        raise UserError(
            f"{first} and {second} both hold case {min(shared)!r}, but from other folders of images or labels; "
            "make one report of each"
        )
    _merge_models(first, run.models, second, other.models)


def _merge_models(
    first: Path | str, models: Sequence[ModelInfo], second: Path, others: Sequence[ModelInfo]
) -> list[ModelInfo]:
    merged = {model.name: model for model in models}
    for model in others:
        known = merged.setdefault(model.name, model)
        if known.sha256 != model.sha256:
            raise UserError(
                f"model {model.name!r} of {first} and that of {second} have different hashes: they are two models; "
                "make one report of each folder, or evaluate them again under different names"
            )
    return list(merged.values())


def _merge_runs(folders: Sequence[Path], runs: Sequence[Run]) -> Run:
    models, cases, conditions = list(runs[0].models), dict.fromkeys(runs[0].cases), runs[0].conditions
    for folder, run in zip(folders[1:], runs[1:], strict=True):
        models = _merge_models(_names(folders[: folders.index(folder)]), models, folder, run.models)
        cases |= dict.fromkeys(run.cases)
        conditions = run.conditions | conditions
    return runs[0].model_copy(update={"models": models, "cases": list(cases), "conditions": conditions})


def _in_order(run: Run, records: list[Record]) -> list[Record]:
    """By model, attack, budget and case, so that the report does not depend on the order of the work."""
    cases = {case: i for i, case in enumerate(run.cases)}
    models = {model.name: i for i, model in enumerate(run.models)}
    attacks = {name: i for i, name in enumerate(["clean", *run.settings.attacks])}
    return sorted(
        records,
        key=lambda r: (
            models.get(r.model, len(models)),
            attacks.get(r.attack.split(":")[0], len(attacks)),
            r.attack,
            -1.0 if r.eps is None else r.eps,
            r.severity or 0,
            cases.get(r.case, len(cases)),
            str(r.key),
        ),
    )


def _require_known(folders: Sequence[Path], run: Run, records: Sequence[Record]) -> None:
    models, cases = {model.name for model in run.models}, set(run.cases)
    for record in records:
        for what, name, known in (("model", record.model, models), ("case", record.case, cases)):
            if name not in known:
                raise UserError(
                    f"the records in {_names(folders)} contain {what} {name!r}, which run.json does not; "
                    "the folder holds the records of another run, evaluate into an empty folder"
                )
