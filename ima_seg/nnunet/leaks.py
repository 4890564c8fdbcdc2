"""Which cases a model was trained on, as far as its folder and nnU-Net's own folders tell; by the ids of the cases."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, RootModel

from ima_seg.errors import UserError, plain
from ima_seg.files import load_json, read_json
from ima_seg.nnunet.checkpoint import restore_ledger
from ima_seg.nnunet.model import LoadedFolder
from ima_seg.validation import validated

SPLITS = "splits_final.json"
_log = logging.getLogger("ima_seg.nnunet")


def training_cases(model: LoadedFolder, images: Path) -> dict[str, str] | None:
    """Case id -> how it is known to the training of ``model``; ``None`` where nothing tells.

    "trained on by fold ..." follows from the margin ledger of an IMA training, from ``splits_final.json`` (in or beside
    the model folder, or in nnUNet_preprocessed), and from the validation folders: what one fold validates, the others
    train on. "in the training set" is all that dataset.json and the folder ``labelsTr`` can tell (in nnUNet_raw, or
    beside ``images``); what every fold holds out is not among them. What cannot be read is left out, with a warning.
    """
    ending = model.dataset_json["file_ending"]
    splits, validations = _splits(model), _validations(model.folder, ending)
    trained: dict[str, dict[str, dict[str, None]]] = {}  # case -> folds and sources, each once, in order
    held: list[set[str]] = []  # of each fold, what it is known not to be trained on

    def note(cases: Iterable[str], fold: str, source: str) -> None:
        for case in cases:
            known = trained.setdefault(case, {"folds": {}, "sources": {}})
            known["folds"][fold] = known["sources"][source] = None

    for fold in model.folds:
        if fold in model.ledgers:
            note(restore_ledger(model.ledgers[fold]).cases, fold, "margin ledger")
        own = validations.get(fold, set())
        if fold == "all":  # it validates on what it trains on
            note({case for split in splits for case in (*split.train, *split.val)}, fold, SPLITS)
            note(own, fold, "validation folder")
            held.append(set())
        elif fold.isdigit() and int(fold) < len(splits):
            note(splits[int(fold)].train, fold, SPLITS)
            held.append(set(splits[int(fold)].val))
        else:
            others = set[str]().union(*(cases for other, cases in validations.items() if other not in (fold, "all")))
            note(others - own, fold, "validation folders of other folds")
            held.append(own)
    found = {
        case: f"trained on by fold {', '.join(known['folds'])} ({', '.join(known['sources'])})"
        for case, known in trained.items()
    }
    sources = _training_set(model, images, ending)
    kept_out = set.intersection(*held)
    for source, cases in sources.items():
        found |= {case: f"in the training set ({source})" for case in cases if case not in found.keys() | kept_out}
    return found if found or sources or any(held) else None


@contextmanager
def _warning() -> Iterator[None]:
    """What cannot be read within is named, and goes no further."""
    try:
        yield
    except (UserError, OSError) as error:
        _log.warning("which cases the model was trained on is told without %s", plain(error))


class _Fold(BaseModel):
    train: list[str]
    val: list[str]


class _Splits(RootModel[list[_Fold]]):
    pass


def _splits(model: LoadedFolder) -> list[_Fold]:
    """The first ``splits_final.json`` there is; empty without one."""
    folders = [model.folder, model.folder.parent]
    if root := os.environ.get("nnUNet_preprocessed"):
        folders.append(Path(root) / model.dataset)
    remedy = "copy it again from nnUNet_preprocessed, or remove it"
    with _warning():
        path = next((folder / SPLITS for folder in folders if (folder / SPLITS).is_file()), None)
        if path is not None:
            contents = load_json(path, missing="does not exist", remedy=remedy)
            return validated(_Splits, contents, source=path, remedy=remedy).root
    return []


class _Row(BaseModel):
    reference_file: str


class _Summary(BaseModel):
    metric_per_case: list[_Row] = []


def _validations(folder: Path, ending: str) -> dict[str, set[str]]:
    """Fold -> the cases in its validation folder, or in the summary that is left of it."""
    found: dict[str, set[str]] = {}
    for validation in folder.glob("fold_*/validation"):
        cases = found[validation.parent.name.removeprefix("fold_")] = _names(validation, ending)
        with _warning():
            if (summary := validation / "summary.json").is_file():
                remedy = "remove it, or validate again"
                contents = read_json(summary, missing="does not exist", remedy=remedy)
                rows = validated(_Summary, contents, source=summary, remedy=remedy).metric_per_case
                cases |= {Path(row.reference_file).name.removesuffix(ending) for row in rows}
    return found


def _training_set(model: LoadedFolder, images: Path, ending: str) -> dict[str, set[str]]:
    """Where -> the cases that belong to the training set there."""
    found = {}
    if (entries := model.dataset_json.get("dataset")) is not None:
        found["dataset.json"] = set(entries)
    folders = [images.resolve().parent] if images.resolve().name == "imagesTr" else []
    if root := os.environ.get("nnUNet_raw"):
        folders.append(Path(root).resolve() / model.dataset)
    for folder in folders:
        if model.dataset and folder.name == model.dataset and (folder / "labelsTr").is_dir():
            found[str(folder / "labelsTr")] = _names(folder / "labelsTr", ending)
    return found


def _names(folder: Path, ending: str) -> set[str]:
    found: set[str] = set()
    with _warning():
        found |= {path.name.removesuffix(ending) for path in folder.iterdir() if path.name.endswith(ending)}
    return found
