"""The cases of two folders: images and labels by their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from ima_seg.cases.check import listed
from ima_seg.cases.raw import CaseFiles, CaseProblem
from ima_seg.errors import UserError


def find_cases(
    images: Path,
    labels: Path,
    *,
    channels: int,
    endings: Sequence[str],
    one_name: bool = False,
    limit: int | None = None,
) -> tuple[list[CaseFiles], list[CaseProblem]]:
    """The complete cases of two folders and the incomplete ones, both sorted by name.

    Images are ``CASE_0000.nii.gz`` to the last of the ``channels``, labels ``CASE.nii.gz``.

    Args:
        images: folder such as ``imagesTs``.
        labels: folder such as ``labelsTs``.
        channels: how many there are.
        endings: of the files, such as ``.nii.gz``.
        one_name: an image may also be named like its label, as in the Decathlon; it may hold its channels along a
            fourth axis.
        limit: stop after so many complete cases.

    Raises:
        UserError: a folder is missing or unreadable, or there is not a single complete case.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit of cases {limit}: give at least 1, or none for all cases")
    image_files, label_files = _list_files(images, "images"), _list_files(labels, "labels")
    there, labelled = _by_stem(images, image_files, endings), _by_stem(labels, label_files, endings)
    names_of: dict[str, list[str]] = {}
    for name in there:
        match = re.fullmatch(r"(.+)_(\d{4})", name, re.DOTALL)
        case, channel = (match[1], int(match[2])) if match else ("", 0)
        if one_name and not (case in labelled and case not in there and name not in labelled and channel < channels):
            case = name
        if case:
            names_of.setdefault(case, []).append(name)
    found: list[CaseFiles] = []
    problems: list[CaseProblem] = []
    for case in sorted(names_of.keys() | labelled):
        if limit is not None and len(found) == limit:
            break
        names, split = names_of.get(case, []), [f"{case}_{index:04d}" for index in range(channels)]
        label = labelled.get(case, labels / f"{case}{endings[0]}")
        if case in labelled and names and names in ([case], split):
            found.append(CaseFiles(case, tuple(there[name] for name in names), label))
        else:
            files = CaseFiles(case, tuple(there.get(name, images / f"{name}{endings[0]}") for name in split), label)
            incomplete = _incomplete_of_one_name if one_name else _incomplete
            problems.append(CaseProblem(case, incomplete(files, [there[name] for name in names], case in labelled)))
    if not found:
        ending, last = endings[0], f" to CASE_{channels - 1:04d}{endings[0]}" if channels > 1 else ""
        expected, remedy = f"CASE_0000{ending}{last}", ", and file_ending and channel_names in dataset.json"
        if one_name:
            expected, remedy = f"CASE{ending}, or CASE_0000{ending} for each channel,", ""
        raise UserError(
            f"no case with images and label: expected {expected} in {images} (found: {listed(image_files)}) and "
            f"CASE{ending} in {labels} (found: {listed(label_files)}); check the folders and the names of the "
            f"files{remedy}"
        )
    return found, problems


def _incomplete(files: CaseFiles, present: Collection[Path], labelled: bool) -> str:
    """What is wrong with a case in nnU-Net's naming."""
    if not present:
        return f"{files.label} has no image: {files.images[0]} does not exist; add it or remove the label"
    if missing := [str(path) for path in files.images if path not in present]:
        return f"channel file {', '.join(missing)} does not exist; add it or remove the case"
    if extra := [path.name for path in present if path not in files.images]:
        return (
            f"{files.images[0].parent} has {', '.join(extra)}, but dataset.json names {len(files.images)} channel(s); "
            "remove the file or correct channel_names"
        )
    assert not labelled
    return f"{files.images[0]} has no label: {files.label} does not exist; add it or remove the image"


def _incomplete_of_one_name(files: CaseFiles, present: Collection[Path], labelled: bool) -> str:
    """The same of a case whose image may be named like its label."""
    if not labelled:
        return f"{next(iter(present))} has no label in {files.label.parent}; add it or remove the image"
    folder = files.images[0].parent
    wanted = ", ".join(f"{files.case}_{i:04d}" for i, path in enumerate(files.images) if path not in present)
    return f"{files.label} has no image: {folder} has neither {files.case} nor {wanted}; add it or remove the label"


def _by_stem(folder: Path, names: Sequence[str], endings: Sequence[str]) -> dict[str, Path]:
    """Name without its ending -> file."""
    return {
        name.removesuffix(ending): folder / name
        for name in names
        for ending in endings
        if name.endswith(ending) and name != ending
    }


def _list_files(folder: Path, content: str) -> list[str]:
    """Sorted names of the files in ``folder``, which should hold ``content``, without hidden ones."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; name the folder with the {content}")
    try:
        return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and not entry.is_dir())
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}); give yourself permission to read it") from None
