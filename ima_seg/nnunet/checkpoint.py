"""Model folders of nnU-Net and their checkpoints."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ima_seg.errors import UserError
from ima_seg.files import replacing
from ima_seg.methods.ledger import MarginLedger
from ima_seg.types import Norm
from ima_seg.validation import validated
from ima_seg.weights import load_tensors, strip_prefixes

#: Key of the state of an IMA training in a checkpoint. Stock nnU-Net ignores keys that it does not know.
KEY = "ima"
#: The same of the methods that IMA is compared with.
METHOD_KEY = "ima_method"

#: The last weights of a training whose ``network_weights`` are an average of them.
TRAINED_KEY = "ima_trained_weights"


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


History = list[dict[str, bool | int | float | str | None]]


class _LedgerSettings(BaseModel):
    model_config = ConfigDict(extra="allow")

    norm: Norm
    delta: float
    eps_max: float
    #: Also one of an earlier version, whose margins are read but not gone on with.
    rule: str
    channel_sd: list[PositiveFloat] | None = None


class _IMAState(BaseModel):
    settings: _LedgerSettings
    history: History
    voxels: PositiveInt
    ledger: dict[str, Any]

    @model_validator(mode="after")
    def _can_be_gone_on_with(self) -> _IMAState:
        restore_ledger({"settings": vars(self.settings), "ledger": self.ledger})
        return self


class _MethodState(BaseModel):
    settings: dict[str, Any]
    history: History
    method: str
    method_state: dict[str, Any]


class _InitArgs(BaseModel):
    configuration: str


class _Checkpoint(BaseModel):
    """What is read in a checkpoint of nnU-Net."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    network_weights: dict[str, torch.Tensor] = Field(min_length=1)
    trainer_name: str
    init_args: _InitArgs
    inference_allowed_mirroring_axes: list[NonNegativeInt] | None = None
    ima: _IMAState | None = None
    ima_method: _MethodState | None = None
    ima_trained_weights: dict[str, torch.Tensor] | None = None


def read_checkpoint(path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Load a ``checkpoint_*.pth`` of nnU-Net; see :func:`ima_seg.weights.load_tensors`.

    Weights have the names of the bare network, axes of mirroring are a list or ``None``.

    Raises:
        UserError: no such file, not a checkpoint of nnU-Net, a damaged one, or one that would run code while ``trust``
            is not set.
    """
    file = Path(path)
    if not file.exists():
        raise UserError(f"checkpoint {file} does not exist; train the fold first or name another one")
    checkpoint = load_tensors(file, trust=trust, allowed=_allowed_globals())
    remedy = "it is damaged or not a checkpoint of nnU-Net v2; use another one"
    found = validated(_Checkpoint, checkpoint, source=file, remedy=remedy)
    axes = found.inference_allowed_mirroring_axes
    weights = strip_prefixes(found.network_weights)
    return {**checkpoint, "network_weights": weights, "inference_allowed_mirroring_axes": axes}


def write_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write ``checkpoint`` to ``path`` in one rename: a reader finds the old file or the new one, never a part."""
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def require_model_folder(folder: Path) -> tuple[Path, Path]:
    """plans.json and dataset.json of a folder that nnUNetv2_train wrote.

    Raises:
        UserError: it is none, and which it might be.
    """
    files = folder / "plans.json", folder / "dataset.json"
    if all(file.is_file() for file in files):
        return files
    if folder.suffix == ".pth" and folder.is_file():
        above = folder.parent
        model = above.parent if above.name.startswith("fold_") else above
        raise UserError(f"{folder} is a checkpoint; name its model's folder, {model}")
    if folder.is_file() and zipfile.is_zipfile(folder):
        raise UserError(
            f"{folder} is an archive; unpack it with nnUNetv2_install_pretrained_model_from_zip (or unzip) and name "
            "the folder in it that holds plans.json"
        )
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist" + (", it is a file" if folder.is_file() else ""))
    if (folder.parent / "plans.json").is_file():
        raise UserError(f"{folder} is a fold of a model; name the model's folder, {folder.parent}, and folds with -f")
    inside = sorted(str(found.parent) for found in [*folder.glob("*/plans.json"), *folder.glob("*/*/plans.json")])
    if inside:
        raise UserError(f"{folder} is no model folder but holds some; name one of them: {', '.join(inside[:8])}")
    missing = next(file.name for file in files if not file.is_file())
    raise UserError(
        f"model folder {folder} has no {missing}; name the folder that nnUNetv2_train wrote, or a MONAI bundle with "
        "its configs"
    )


def checkpoint_files(model_folder: str | Path) -> list[Path]:
    """All ``fold_*/checkpoint_*.pth`` of a model folder, sorted.

    Raises:
        UserError: there are none.
    """
    files = sorted(Path(model_folder).glob("fold_*/checkpoint_*.pth"))
    if not files:
        raise UserError(f"model folder {model_folder} has no fold_*/checkpoint_*.pth; train a fold first")
    return files


def restore_ledger(state: Mapping[str, Any]) -> MarginLedger:
    """The ledger in our state of a checkpoint, its :data:`KEY`, to be looked at."""
    settings = state["settings"]
    ledger = MarginLedger(delta=settings["delta"], eps_max=settings["eps_max"])
    ledger.load_state_dict(state["ledger"])
    return ledger
