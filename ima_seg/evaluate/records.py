"""What an evaluation writes down: one JSON line per (case, model, attack, budget), and one per case that failed.

``records.jsonl`` is the source of every table and figure; the report is made from it alone and never recomputes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from ima_seg.errors import UserError
from ima_seg.evaluate.run import Budget, Count, Eps, NonNegative, Norm, Number, Portion, Strict, Unit
from ima_seg.files import naming

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
    dice: Portion | None
    nsd: Portion | None  # normalised surface Dice at the tolerance of the settings
    hd95_mm: NonNegative | None
    reference_ml: NonNegative
    prediction_ml: NonNegative
    tp: Count  # voxels, for pooled averages
    fp: Count
    fn: Count

    @property
    def volume_error_ml(self) -> float:
        """Predicted minus reference volume."""
        return self.prediction_ml - self.reference_ml


class SliceDice(Strict):
    """Mean over slices with foreground of the per-slice foreground Dice, in the network's slice direction."""

    mean: Portion
    slices: Count


class Size(Strict):
    """Size of a perturbation."""

    rms: NonNegative  # per voxel, SD
    l2: NonNegative  # of the whole volume, SD
    linf: NonNegative  # SD
    l2_slice: NonNegative | None = None  # largest L2 of one slice (slice budgets), SD
    native_rms: list[NonNegative]  # per channel, original intensities (HU for CT); empty where there is no way to them
    native_linf: list[NonNegative]
    percent_rms: list[NonNegative]  # per channel, % of the image's 0.5-99.5 percentile range
    psnr_db: Number | None  # None: no perturbation
    ssim: Number | None


class Disk(Strict):
    """The adversarial file, re-read from disk and predicted again from the start."""

    image: list[str]  # paths relative to the output folder, one per channel
    difference: list[str]
    dice: Portion | None
    rms: NonNegative  # of the perturbation between the files on disk, per voxel, SD
    linf: NonNegative
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
    eps: Eps | None = None  # budget as asked for, in ``unit``; None without a budget
    eps_network: NonNegative | None = None  # budget per voxel in SD
    budget: Budget | None = None
    severity: Annotated[int, Field(ge=1, le=5)] | None = None  # 1-5, corruptions
    classes: dict[str, ClassMetrics]
    dice: Portion | None  # mean over classes that have a value
    nsd: Portion | None
    hd95_mm: NonNegative | None
    slice_dice: SliceDice | None = None
    sd: list[NonNegative] = Field(default_factory=list)  # clean record: network units per SD of each channel
    size: Size | None = None
    breaking_rms: NonNegative | None = None  # minimal: smallest breaking perturbation found; None: not broken
    disk: Disk | None = None
    trace: list[Number] = Field(default_factory=list)  # worst Dice (network space) found up to each step, best restart
    zero_gradient: Portion | None = None  # share of gradient passes that were exactly zero
    #: Clean record of a process's first case: largest difference of two computations of the same input gradient, as a
    #: share of the largest gradient. 0: the device is deterministic.
    repeat_difference: NonNegative | None = None
    forwards: Count = 0  # network passes over the whole volume
    gradients: Count = 0
    seconds: NonNegative = 0.0  # attack and prediction
    metric_seconds: NonNegative = 0.0
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


@contextmanager
def explained(
    where: str, remedy: str, *, named: Callable[[str], str] | None = None, faults: list[str] | None = None
) -> Iterator[None]:
    """What pydantic refuses within, in a line for users.

    Args:
        where: what the line begins with.
        remedy: what it ends with.
        named: what users call a field of the model.
        faults: gets the line, without remedy, instead of an error.

    Raises:
        UserError: says ``where``, the field, its value and the ``remedy``.
    """
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field, message = ".".join(map(str, first["loc"])), first["msg"]
        if named is not None and field:
            field = named(str(first["loc"][0]))
        field = field[:100]
        # Of a whole line there is no value to show.
        value = f" is {first['input']!r}"[:100] if field and first["type"] != "missing" else ""
        reason = f"{where}{field}{value}: {message[:1].lower()}{message[1:]}"[:500] if field else f"{where}{message}"
        if faults is None:
            raise UserError(f"{reason}; {remedy}") from None
        faults.append(reason)


def append_line(path: Path, item: BaseModel) -> None:
    """Append ``item`` as one line that is on the disk when this returns.

    Raises:
        UserError: the line could not be read back, and is not written.
    """
    line = f"{item.model_dump_json()}\n".encode()
    parse(line, type(item), f"a line for {path}")
    with naming(path), path.open("ab", buffering=0) as file:
        while line:  # a full disk takes a part without an error
            line = line[file.write(line) :]
        os.fsync(file.fileno())


def drop_half_line(path: Path) -> None:
    """Cut off a last line without its end, which a killed run may have left."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


_REMEDY = "the file was changed, damaged or written by another version; evaluate again"


def parse(text: bytes, kind: type[_Item], where: str) -> _Item:
    """An item from its JSON.

    Raises:
        UserError: it is none; says ``where``.
    """
    with explained(f"{where}: no valid {kind.__name__.lower()}: ", _REMEDY):
        return kind.model_validate_json(text)


def read_lines(paths: Iterable[Path], kind: type[_Item], damaged: list[str] | None = None) -> Iterator[_Item]:
    """The records or failures in ``paths``; a half last line is passed over.

    Args:
        paths: files to read.
        kind: what their lines hold.
        damaged: gets file, number and fault of each line that holds none, instead of an error.

    Raises:
        UserError: a line that is none; names file and line.
    """
    for path in paths:
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            item = None
            with explained(f"{path}, line {number}: no valid {kind.__name__.lower()}: ", _REMEDY, faults=damaged):
                item = kind.model_validate_json(line)
            if item is not None:
                yield item
