"""Tasks of the Medical Segmentation Decathlon: from the download to an nnU-Net raw data set.

The conversion itself is nnU-Net's. This module checks what comes in, so that a mistake is named before anything is
written, supplies what real downloads lack, and puts the result in place in one rename.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
from nibabel.filebasedimages import ImageFileError

from ima_seg.data.archives import ARCHIVE_ENDINGS, check_md5, is_archive, unpack_single_folder
from ima_seg.data.naming import dataset_folder_name, raw_root, taken_by_other
from ima_seg.data.recipes import recipe_of_task
from ima_seg.errors import UserError
from ima_seg.files import read_json

_TASK = re.compile(r"Task(\d{2,3})_([A-Za-z0-9-]+)")
_NIFTI = ".nii.gz"


def convert_decathlon(
    path: Path, *, dataset_id: int | None = None, num_processes: int | None = None, verify: bool = True
) -> Path:
    """Convert a downloaded Decathlon task into ``nnUNet_raw``.

    The download is only read. ``._*`` files are ignored, a missing ``imagesTs`` counts as no test cases, and licence
    and reference stay in ``dataset.json``. nnU-Net starts its worker processes by spawning, so a script that calls this
    needs the usual ``if __name__ == "__main__":`` guard.

    Args:
        path: the folder ``TaskNN_Name``, or its archive (.tar, .tar.gz, .tgz).
        dataset_id: nnU-Net's id; default: the task's number.
        num_processes: worker processes; default: ``nnUNet_def_n_proc``, else the number of processors, at most 4.
        verify: compare the MD5 sum of a known task's .tar archive with the recipe's, and require every training case
            that ``dataset.json`` lists.

    Returns:
        The new folder ``nnUNet_raw/DatasetNNN_Name``.

    Raises:
        UserError: ``nnUNet_raw`` is not set, the id is taken, or the download is missing, damaged or no Decathlon task.
    """
    root = raw_root()
    path = Path(os.path.abspath(path))
    if num_processes is None:
        given = os.environ.get("nnUNet_def_n_proc", "")
        num_processes = int(given) if given.isdecimal() and int(given) else min(os.cpu_count() or 1, 4)
    if num_processes < 1:
        raise UserError(f"number of processes {num_processes}: give at least 1")
    if not path.exists():
        raise UserError(f"{path} does not exist: give the downloaded folder TaskNN_Name or its .tar archive")
    if path.is_file() and not is_archive(path):
        raise UserError(f"{path} is no archive ({', '.join(ARCHIVE_ENDINGS)}) and no folder: give one of these")
    try:
        folder = tempfile.TemporaryDirectory(prefix=".decathlon.", suffix=".tmp", dir=root, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"nnUNet_raw: cannot write in {root} ({error.strerror}): name a writable folder") from error
    with folder as name:
        scratch = Path(name)
        source = _unpack(path, scratch / "unpacked", verify) if path.is_file() else path
        target = root / _target_name(source, path, dataset_id)
        staged = _stage(source, scratch / "staged", verify)
        (scratch / "raw").mkdir()
        made = scratch / "raw" / target.name
        _run_nnunet(staged, scratch / "raw", int(target.name[7:10]), num_processes)
        if not made.is_dir():
            raise UserError(f"{path}: nnU-Net's conversion left no {target.name}: check that nnunetv2 is version 2.8")
        if target.exists():
            raise UserError(f"{target} has appeared meanwhile: remove it or choose another id")
        made.rename(target)
    return target


def _unpack(archive: Path, into: Path, verify: bool) -> Path:
    stem = archive.name[: archive.name.lower().rindex(".t")]
    known = _check_sum(archive, stem) if verify else True
    into.mkdir()
    folder = unpack_single_folder(archive, into)
    if not known:  # a renamed download: the folder inside tells the task
        _check_sum(archive, folder.name)
    return folder


def _check_sum(archive: Path, task: str) -> bool:
    """Check a plain .tar against the recipe, if there is one; a recompressed archive has no published sum."""
    recipe = recipe_of_task(task)
    if recipe is not None and recipe.decathlon is not None and archive.suffix.lower() == ".tar":
        check_md5(archive, recipe.decathlon.md5)
    return recipe is not None


def _target_name(source: Path, given: Path, dataset_id: int | None) -> str:
    match = _TASK.fullmatch(source.name)
    if match is None:
        what = f"the folder {source.name} in {given}" if source.name != given.name else str(given)
        raise UserError(f"{what} is not named like a Decathlon task: it must be TaskNN_Name, e.g. Task04_Hippocampus")
    number = int(match[1]) if dataset_id is None else dataset_id
    name = dataset_folder_name(number, match[2])
    if taken := taken_by_other(number):
        raise UserError(f"dataset id {number} is taken by {taken[0]}: choose another id (-d), or remove that folder")
    return name


def _stage(source: Path, into: Path, verify: bool) -> Path:
    """Lay out what nnU-Net's converter expects as links to ``source``, with a completed ``dataset.json``."""
    content = _read_description(source)
    for name in ("imagesTr", "labelsTr"):
        if not (source / name).is_dir():
            raise UserError(f"{source}: the folder {name} is missing: download or unpack the task again")
    # Those that nnU-Net's converter will take, not those that begin with a dot or an underscore.
    images, labels = (
        {path.name for path in (source / name).glob(f"*{_NIFTI}") if path.is_file() and path.name[0] not in "._"}
        for name in ("imagesTr", "labelsTr")
    )
    if not images:
        raise UserError(f"{source / 'imagesTr'}: no {_NIFTI} files: download or unpack the task again")
    if unpaired := sorted(images ^ labels):
        lacking = "label" if unpaired[0] in images else "image"
        raise UserError(f"{source}: {unpaired[0]} has no {lacking}: download or unpack the task again")
    if verify:
        _check_listed(source, content, images)
    for name in sorted(images):
        _check_channels(source / "imagesTr" / name, len(content["modality"]))
    staged = into / source.name
    staged.mkdir(parents=True)
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        if not (source / name).is_dir():
            (staged / name).mkdir()
            continue
        try:
            (staged / name).symlink_to(source / name, target_is_directory=True)
        except OSError:  # no right to make links, as on a plain Windows account
            shutil.copytree(source / name, staged / name)
    content |= {"numTraining": len(images), "training": [], "test": []}
    (staged / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return staged


def _read_description(source: Path) -> dict[str, Any]:
    path = source / "dataset.json"
    missing = f"is missing: {source.name} is no complete Decathlon task, download it again"
    content = read_json(path, missing=missing, remedy="download the task again")
    if "channel_names" in content and "modality" not in content:
        raise UserError(f"{path} is in nnU-Net's own format already: put the folder into nnUNet_raw as it is")
    for key, example in (("modality", '{"0": "MRI"}'), ("labels", '{"0": "background", "1": "organ"}')):
        value = content.get(key)
        if not isinstance(value, dict) or not value or not all(str(number).isdecimal() for number in value):
            raise UserError(f"{path}: the key {key!r} is missing or malformed, it must read like {example}")
    if content["labels"].get("0") != "background":
        raise UserError(f"{path}: label 0 is {content['labels'].get('0')!r}: nnU-Net needs it named 'background'")
    return content


def _check_listed(source: Path, content: dict[str, Any], images: set[str]) -> None:
    listed = content.get("training")
    for entry in listed if isinstance(listed, list) else ():
        name = Path(str(entry.get("image", "") if isinstance(entry, dict) else entry)).name
        if name and name not in images:
            raise UserError(
                f"{source}: dataset.json lists {name}, which is not in imagesTr: the download is incomplete, "
                "repeat it, or convert what is there (--no-verify)"
            )


def _check_channels(path: Path, channels: int) -> None:
    try:
        shape = tuple(int(size) for size in nib.load(path).shape)
    except (OSError, EOFError, ImageFileError) as error:
        raise UserError(f"{path}: cannot be read as NIfTI ({error}): download it again") from error
    found = shape[3] if len(shape) == 4 else 1
    if len(shape) not in (3, 4) or found != channels:
        raise UserError(f"{path}: shape {shape} holds {found} channels, dataset.json names {channels}: repair either")


def _run_nnunet(staged: Path, raw: Path, dataset_id: int, num_processes: int) -> None:
    """Run nnU-Net's converter with ``nnUNet_raw`` pointing at ``raw`` for its duration."""
    from nnunetv2.dataset_conversion.convert_MSD_dataset import convert_msd_dataset

    before = os.environ["nnUNet_raw"]
    os.environ["nnUNet_raw"] = str(raw)
    try:
        convert_msd_dataset(str(staged), dataset_id, num_processes)
    except RuntimeError as error:  # what SimpleITK raises for a file that it cannot read; it names the file
        raise UserError(f"nnU-Net could not convert the task: {error}: repair or download that file again") from error
    finally:
        os.environ["nnUNet_raw"] = before
