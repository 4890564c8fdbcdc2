"""What an evaluation writes down: one JSON line per (case, model, attack, budget), and one per case that failed.

``records.jsonl`` is the source of every table and figure; the report is made from it alone and never recomputes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from ima_seg.errors import UserError
from ima_seg.evaluate.run import Budget, Norm, Strict, Unit

_Item = TypeVar("_Item", bound=BaseModel)

#: Kinds of records. ``white``: uses gradients of the model; ``black``: its outputs only; ``transfer``: perturbation
#: made on another model; ``noise``: random; ``minimal``: the smallest perturbation that breaks the case, of no fixed
#: budget; ``targeted``: one organ is to disappear or to appear; ``corruption``: natural, with a severity, no budget.
Kind = Literal["clean", "white", "black", "transfer", "noise", "minimal", "targeted", "corruption"]

#: ``ok``; ``reference_empty``: the class is not in the reference but predicted (Dice and NSD 0, HD95 the image
#: diagonal); ``prediction_empty``: in the reference but not predicted (the same); ``both_empty``: neither (no value,
#: left out of means and counted).
ClassState = Literal["ok", "reference_empty", "prediction_empty", "both_empty"]


class ClassMetrics(Strict):
    """Metrics of one class or region of one prediction, in the geometry of the label file."""

    state: ClassState
    dice: float | None
    nsd: float | None  # normalised surface Dice at the tolerance of the settings
    hd95_mm: float | None
    reference_ml: float
    prediction_ml: float
    tp: int  # voxels, for pooled averages
    fp: int
    fn: int

    @property
    def volume_error_ml(self) -> float:
        """Predicted minus reference volume."""
        return self.prediction_ml - self.reference_ml


class SliceDice(Strict):
    """Mean over slices with foreground of the per-slice foreground Dice, in the network's slice direction."""

    mean: float
    slices: int


class Size(Strict):
    """Size of a perturbation."""

    rms: float  # per voxel, SD
    l2: float  # of the whole volume, SD
    linf: float  # SD
    l2_slice: float | None = None  # largest L2 of one slice (slice budgets), SD
    native_rms: list[float]  # per channel, original intensities (HU for CT); empty where there is no way to them
    native_linf: list[float]
    percent_rms: list[float]  # per channel, % of the image's 0.5-99.5 percentile range
    psnr_db: float | None  # None: no perturbation
    ssim: float | None


class Disk(Strict):
    """The adversarial file, re-read from disk and predicted again from the start."""

    image: list[str]  # paths relative to the output folder, one per channel
    difference: list[str]
    dice: float | None
    rms: float  # of the perturbation between the files on disk, per voxel, SD
    linf: float
    resampled: bool  # whether the preprocessing of this case resamples (then dice may differ from the record's)
    rounded: bool = False  # whether the file holds whole numbers only (the same)


class Record(Strict):
    """One evaluation of one case."""

    case: str
    model: str
    kind: Kind
    attack: str  # "clean", "pgd", "transfer:OTHER", "disappear:CLASS", "corruption:blur", ...
    norm: Norm | None = None
    unit: Unit | None = None  # of eps
    eps: float | None = None  # budget as asked for, in ``unit``; None without a budget
    eps_network: float | None = None  # budget per voxel in SD
    budget: Budget | None = None
    severity: int | None = None  # 1-5, corruptions
    classes: dict[str, ClassMetrics]
    dice: float | None  # mean over classes that have a value
    nsd: float | None
    hd95_mm: float | None
    slice_dice: SliceDice | None = None
    sd: list[float] = Field(default_factory=list)  # clean record: network units per SD of each channel
    size: Size | None = None
    breaking_rms: float | None = None  # minimal: smallest breaking perturbation found; None: the case was not broken
    disk: Disk | None = None
    trace: list[float] = Field(default_factory=list)  # worst Dice (network space) found up to each step, best restart
    zero_gradient: float | None = None  # share of gradient passes that were exactly zero
    #: Clean record of a process's first case: largest difference of two computations of the same input gradient, as a
    #: share of the largest gradient. 0: the device is deterministic.
    repeat_difference: float | None = None
    forwards: int = 0  # network passes over the whole volume
    gradients: int = 0
    seconds: float = 0.0  # attack and prediction
    metric_seconds: float = 0.0
    panel: str | None = None  # npz with the slices to show, relative to the output folder

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies the record within a run."""
        return (self.case, self.model, self.attack, self.eps, self.severity)


class Failure(Strict):
    """A case that could not be evaluated; ``model`` is None where no model could."""

    case: str
    model: str | None = None
    message: str


def append_line(path: Path, item: BaseModel) -> None:
    """Append ``item`` as one line, in one write that is on the disk when this returns."""
    with path.open("ab", buffering=0) as file:
        file.write(f"{item.model_dump_json()}\n".encode())
        os.fsync(file.fileno())


def drop_half_line(path: Path) -> None:
    """Cut off a last line without its end, which a killed run may have left."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def parse(text: bytes, kind: type[_Item], where: str) -> _Item:
    """An item from its JSON.

    Raises:
        UserError: it is none; says ``where``.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise UserError(
            f"{where}: no valid {kind.__name__.lower()} ({reason}); the file was changed by hand or written by another "
            "version, evaluate again"
        ) from None


def read_lines(paths: Iterable[Path], kind: type[_Item]) -> Iterator[_Item]:
    """The records or failures in ``paths``; a half last line is passed over.

    Raises:
        UserError: a line that is none; names file and line.
    """
    for path in paths:
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            yield parse(line, kind, f"{path}, line {number}")
