"""Names and places of nnU-Net raw data sets: which ids are free, where they go, how a folder is made."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ima_seg.errors import UserError

FOLDER_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def raw_root() -> Path:
    """Return the folder named by ``nnUNet_raw``, made if it is missing.

    Raises:
        UserError: the variable is not set, or names a file.
    """
    value = os.environ.get("nnUNet_raw")
    if not value:
        raise UserError(
            "the environment variable nnUNet_raw is not set: set it to the folder that holds nnU-Net's raw data sets, "
            "e.g. export nnUNet_raw=$HOME/nnUNet_raw"
        )
    return make_folder(Path(value), "nnUNet_raw")


def make_folder(path: Path, meaning: str) -> Path:
    """Make ``path`` and its parents; ``meaning`` names it in the error.

    Raises:
        UserError: a file is in the way or the place is not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot make the folder {path} ({error.strerror})"
        raise UserError(f"{meaning}: {reason}: name a writable folder") from error
    return path


def dataset_folder_name(dataset_id: int, name: str) -> str:
    """Return nnU-Net's folder name, e.g. ``Dataset004_Hippocampus``.

    Raises:
        UserError: the id is outside 1..999 (nnU-Net reads three digits), or the name holds something other than
            letters, digits, single ``_`` and ``-``.
    """
    if not 1 <= dataset_id <= 999:
        raise UserError(f"dataset id {dataset_id} is outside 1..999: nnU-Net reads exactly three digits")
    if not re.fullmatch(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*", name):
        raise UserError(
            f"data set name {name!r} does not suit a folder: use letters and digits, parted by single '_' or '-'"
        )
    return f"Dataset{dataset_id:03d}_{name}"


def folders_with_id(dataset_id: int, folder: Path) -> list[Path]:
    """Return the data set folders in ``folder`` that carry ``dataset_id``, sorted by name."""
    return sorted(path for path in folder.glob(f"Dataset{dataset_id:03d}_*") if path.is_dir())


def taken_by_other(dataset_id: int, folder_name: str | None = None) -> list[Path]:
    """Return every folder under nnU-Net's three roots that carries the id under a name other than ``folder_name``.

    nnU-Net refuses an id that leads to two names, wherever the two lie.
    """
    roots = [Path(root) for variable in FOLDER_VARIABLES if (root := os.environ.get(variable))]
    return [path for root in roots for path in folders_with_id(dataset_id, root) if path.name != folder_name]
