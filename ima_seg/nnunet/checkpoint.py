"""Reading and amending nnU-Net checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ima_seg.errors import UserError
from ima_seg.files import replacing
from ima_seg.methods.ledger import MarginLedger
from ima_seg.weights import load_tensors

#: Key of the state of an IMA training in a checkpoint. Stock nnU-Net ignores keys that it does not know.
KEY = "ima"
#: The same of the methods that IMA is compared with.
METHOD_KEY = "ima_method"


def _allowed_globals() -> list[Any]:
    """What stock nnU-Net checkpoints hold beyond tensors: numpy scalars and arrays in the logged curves."""
    core = getattr(np, "_core", None) or np.core
    scalars = [np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_]
    dtypes = [type(np.dtype(scalar)) for scalar in scalars]
    # numpy 2 renamed the module; files of either name are read.
    functions = [
        (getattr(core.multiarray, name), f"{module}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for module in ("numpy.core", "numpy._core")
    ]
    return [*functions, np.dtype, np.ndarray, *scalars, *dtypes]


def read_checkpoint(path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Load a ``checkpoint_*.pth`` of nnU-Net; see :func:`ima_seg.weights.load_tensors`.

    Raises:
        UserError: no such file, not a checkpoint of nnU-Net, or one that would run code while ``trust`` is not set.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"checkpoint {file} does not exist; train the fold first or name another one")
    checkpoint: dict[str, Any] = load_tensors(file, trust=trust, allowed=_allowed_globals())
    if not isinstance(checkpoint, dict) or not {"network_weights", "trainer_name"} <= checkpoint.keys():
        raise UserError(f"{file} is not a checkpoint of nnU-Net v2 (no network_weights, trainer_name)")
    return checkpoint


def write_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write ``checkpoint`` to ``path`` in one rename: a reader finds the old file or the new one, never a part."""
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def checkpoint_files(model_folder: str | Path) -> list[Path]:
    """All ``fold_*/checkpoint_*.pth`` of a model folder, sorted.

    Raises:
        UserError: the folder does not exist or holds none.
    """
    folder = Path(model_folder)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    files = sorted(folder.glob("fold_*/checkpoint_*.pth"))
    if not files:
        raise UserError(f"model folder {folder} has no fold_*/checkpoint_*.pth; name the folder that holds plans.json")
    return files


def restore_ledger(state: Mapping[str, Any]) -> MarginLedger:
    """The ledger in our state of a checkpoint, its :data:`KEY`."""
    settings = state["settings"]
    ledger = MarginLedger(delta=settings["delta"], eps_max=settings["eps_max"], rule=settings["rule"])
    ledger.load_state_dict(state["ledger"])
    return ledger
