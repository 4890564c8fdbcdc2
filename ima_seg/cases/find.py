"""The cases of two folders: images and labels by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import BaseModel, Field

from ima_seg.cases.check import listed
from ima_seg.cases.raw import CaseFiles, CaseProblem
from ima_seg.errors import UserError
from ima_seg.files import read_json
from ima_seg.validation import validated

#: Endings of files that hold volumes, and of those that hold slices or are mere pictures beside volumes.
VOLUMES = (
    ".nii.gz", ".gipl.gz", ".img.gz", ".nii", ".img", ".hdr", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".mgz", ".mgh",
    ".mnc", ".tiff", ".tif",
)  # fmt: skip
PICTURES = (".png", ".bmp", ".jpeg", ".jpg")


def find_cases(
    images: Path,
    labels: Path,
    *,
    channels: int,
    endings: Sequence[str],
    one_name: bool = False,
    one_file: bool = False,
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
        one_file: the first file of an image may hold all of its channels, as a picture in colour does.
        limit: stop after so many complete cases.

    Raises:
        UserError: a folder is missing or unreadable, or there is not a single complete case.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit of cases {limit}: give at least 1, or none for all cases")
    image_files, label_files = _list_files(images, "images"), _list_files(labels, "labels")
    there, images_twice = _by_stem(images, image_files, endings)
    labelled, labels_twice = _by_stem(labels, label_files, endings)
    names_of: dict[str, list[str]] = {}
    for name in there:
        match = re.fullmatch(r"(.+)_(\d{4})", name, re.DOTALL)
        case, channel = (match[1], int(match[2])) if match else ("", 0)
        if one_name and not (case in labelled and case not in there and name not in labelled and channel < channels):
            case = name
        if case:
            names_of.setdefault(case, []).append(name)
    passed = _passed_over(images, image_files, labels, label_files, endings, one_name=one_name)
    found: list[CaseFiles] = []
    problems: list[CaseProblem] = []
    for case in sorted({*names_of, *labelled, *passed}):
        if limit is not None and len(found) == limit:
            break
        names, split = names_of.get(case, []), [f"{case}_{index:04d}" for index in range(channels)]
        label = labelled.get(case, labels / f"{case}{endings[0]}")
        if double := [images / name for name in names if name in images_twice] or (case in labels_twice and [label]):
            message = f"{double[0]} is there with two endings ({', '.join(endings)}); remove the file that is not meant"
            problems.append(CaseProblem(case, message))
        elif case in labelled and names and (names in ([case], split) or (one_file and names == split[:1])):
            found.append(CaseFiles(case, tuple(there[name] for name in names), label))
        elif case in passed:
            problems.append(CaseProblem(case, _other_names(passed[case], endings[0], one_name=one_name)))
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


class _Entry(BaseModel):
    images: list[str] = Field(min_length=1)
    label: str


class _Listing(BaseModel):
    dataset: dict[str, _Entry]


def listed_cases(
    source: Path, root: Path | None, *, channels: Collection[int], limit: int | None = None
) -> tuple[list[CaseFiles], list[CaseProblem]]:
    """The cases that a dataset.json names under ``dataset``, as nnU-Net reads it, with their problems.

    Args:
        source: the file.
        root: what relative paths start from; ``None`` where it is not known.
        channels: how many files an image may have.
        limit: stop after so many cases.

    Raises:
        UserError: a file that is missing or names no cases; relative paths without ``root``.
    """
    if source.is_dir():
        raise UserError(f"{source} is a folder of images; name that of the labels, too, with -gt")
    remedy = 'name folders with -i and -gt, or a dataset.json with "dataset" with -i'
    contents = read_json(source, missing=f"does not exist; {remedy}", remedy=remedy)
    if "dataset" not in contents:
        raise UserError(f'{source} names no files (it has no "dataset"); {remedy}')
    form = 'an entry is "CASE": {"images": [one file per channel], "label": file}'
    entries = validated(_Listing, contents, source=source, remedy=form).dataset

    def path(name: str) -> Path:
        expanded = Path(os.path.expandvars(name))
        if root is None and not expanded.is_absolute():
            raise UserError(
                f"{source} names {name}, relative to the data set's folder in nnUNet_raw; set that variable, or name "
                "the dataset.json in that folder with -i"
            )
        return expanded if expanded.is_absolute() else Path(os.path.abspath((root or Path()) / expanded))

    found: list[CaseFiles] = []
    problems: list[CaseProblem] = []
    for case, entry in sorted(entries.items()):
        if limit is not None and len(found) == limit:
            break
        if len(entry.images) in channels:
            found.append(CaseFiles(case, tuple(path(name) for name in entry.images), path(entry.label)))
        else:
            wanted = " or ".join(map(str, sorted(channels)))
            message = f"{source} names {len(entry.images)} image files, the model has {wanted}; correct its entry"
            problems.append(CaseProblem(case, message))
    if not found:
        raise UserError(f"{source} names no case that the model can read; {remedy}")
    return found, problems


def _passed_over(
    images: Path, image_files: Sequence[str], labels: Path, label_files: Sequence[str], endings: Sequence[str], *,
    one_name: bool,
) -> dict[str, list[Path]]:  # fmt: skip
    """Case -> files that look like its own, but are named otherwise than those that are taken."""
    known = [ending.lower() for ending in endings]
    known += (*VOLUMES, *PICTURES) if set(known) & set(PICTURES) else VOLUMES
    found: dict[str, list[Path]] = {}
    for name in label_files:
        if (stem := _stem(name, known)) and not name.endswith(tuple(endings)):
            found.setdefault(stem, []).append(labels / name)
    stems = {_stem(name, known) for name in label_files}
    for name in image_files:
        stem = _stem(name, known)
        numbered = re.fullmatch(r"(.+)_\d{4}", stem, re.DOTALL)
        if stem and not (name.endswith(tuple(endings)) and (one_name or numbered)):
            case = numbered[1] if numbered and stem not in stems else stem
            found.setdefault(case, []).append(images / name)
    return found


def _other_names(files: Sequence[Path], ending: str, *, one_name: bool) -> str:
    """What is wrong with a case of which files are there under other names."""
    expected = f"CASE{ending}" if one_name else f"CASE_0000{ending} (images, one per channel) and CASE{ending} (labels)"
    return (
        f"{listed(files)} {'is' if len(files) == 1 else 'are'} not taken: the model reads {expected}; rename what is "
        "only spelt otherwise, convert what is of another format"
    )


def without_ending(name: str) -> str:
    """The name of a file without the ending of its format, or without its suffix where that is not known."""
    return _stem(name, (*VOLUMES, *PICTURES)) or Path(name).stem


def _stem(name: str, endings: Sequence[str]) -> str:
    """The name of a file without the first of ``endings`` that it has, whatever its spelling; empty if it has none."""
    return next((name[: -len(ending)] for ending in endings if name.lower().endswith(ending)), "")


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


def _by_stem(folder: Path, names: Sequence[str], endings: Sequence[str]) -> tuple[dict[str, Path], set[str]]:
    """Name without its ending -> file; and the names that more than one file has."""
    found: dict[str, Path] = {}
    twice = set()
    for name in names:
        ending = next((ending for ending in endings if name.endswith(ending) and name != ending), None)
        if ending is not None:
            stem = name.removesuffix(ending)
            twice |= {stem} & found.keys()
            found[stem] = folder / name
    return found, twice


def _list_files(folder: Path, content: str) -> list[str]:
    """Sorted names of the files in ``folder``, which should hold ``content``, without hidden ones."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; name the folder with the {content}")
    try:
        # A folder that is named like a volume is no case, but must not vanish.
        there = [entry.name for entry in folder.iterdir() if _stem(entry.name, VOLUMES) or not entry.is_dir()]
        return sorted(name for name in there if not name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}); give yourself permission to read it") from None
