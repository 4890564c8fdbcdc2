"""``ima-seg margins``: the training margins of a model, printed and plotted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ima_seg.errors import UserError, plain
from ima_seg.files import write_csv
from ima_seg.methods.ledger import MarginLedger
from ima_seg.methods.margins import FEW_SEARCHED, PROGRESS_FILE, margin_rows, never_searched
from ima_seg.methods.plots import plot_progress
from ima_seg.nnunet.checkpoint import KEY, read_checkpoint, require_model_folder, restore_ledger
from ima_seg.nnunet.dataset import channel_names
from ima_seg.nnunet.description import read_configuration, read_dataset
from ima_seg.nnunet.intensity import native_scale, shared_native_scale
from ima_seg.nnunet.parts import require_reader
from ima_seg.validation import validated

#: The one that training goes on from comes first.
_CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
#: Of many cases, so many with the smallest and with the largest margins are printed.
ENDS = 12
#: What would make a path of a case id.
_PATH = frozenset("/\\\0")


class _Epoch(BaseModel):
    """What is drawn and printed of an epoch; shares of nothing are NaN."""

    epoch: int
    equilibrium: bool
    margin_q05: float
    margin_q25: float
    margin_q50: float
    margin_q75: float
    margin_q95: float
    expanding_share: float
    crossed_share: float
    below_tau_share: float
    background_share: float
    clean_loss: float
    adversarial_loss: float
    passes_per_sample: float


class _Course(BaseModel):
    history: list[_Epoch]


@dataclass(frozen=True)
class FoldMargins:
    """The ledger of one fold, as its newest checkpoint holds it."""

    folder: Path
    checkpoint: str
    ledger: MarginLedger
    settings: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    voxels: int
    configuration: str


def _newest(fold: Path) -> str | None:
    return next((name for name in _CHECKPOINTS if (fold / name).is_file()), None)


def read_margins(
    model_folder: str | Path, folds: Sequence[str] | None = None, *, trust: bool = False
) -> tuple[list[FoldMargins], dict[Path, str]]:
    """The margins of every fold of a model folder that can be read (or of the ``folds`` named); why not of the others.

    Raises:
        UserError: no such folder, no fold that can be read, or one of the ``folds`` cannot.
    """
    model = Path(model_folder)
    require_model_folder(model)
    if folds:
        return [_read_fold(model / f"fold_{fold}", trust=trust) for fold in folds], {}
    found: list[FoldMargins] = []
    left_out: dict[Path, str] = {}
    for folder in sorted(model.glob("fold_*")):
        try:
            found.append(_read_fold(folder, trust=trust))
        except (UserError, OSError) as error:
            left_out[folder] = str(error)
    if not found:
        reasons = [reason for folder, reason in left_out.items() if _newest(folder)]
        if not reasons:
            raise UserError(f"model folder {model} has no fold_* with a checkpoint; train a fold first")
        others = len(left_out) - 1
        raise UserError(reasons[0] + (f" (and no margins in {others} other folds)" if others else ""))
    return found, left_out


def _read_fold(folder: Path, *, trust: bool) -> FoldMargins:
    name = _newest(folder)
    if name is None:
        raise UserError(f"{folder} has no checkpoint; train the fold first")
    checkpoint = read_checkpoint(folder / name, trust=trust)
    state = checkpoint.get(KEY)
    if state is None:
        raise UserError(f"{folder / name} holds no margin ledger; it was trained by {checkpoint['trainer_name']}")
    ledger, configuration = restore_ledger(state), checkpoint["init_args"]["configuration"]
    settings, history, voxels = state["settings"], state["history"], state["voxels"]
    validated(_Course, {"history": history}, source=folder / name, remedy="use an earlier checkpoint")
    return FoldMargins(folder, name, ledger, settings, history, voxels, configuration)


def show_margins(
    fold: FoldMargins, *, images: Path | None = None, output: Path | None = None, console: Console | None = None
) -> None:
    """Print one fold's margins, widest last (of many cases both ends only), and write its plot.

    A folder of the training ``images`` adds the margins in native intensity units. ``output`` is a folder for
    ``ima_progress.png`` and, with ``images``, ``ima_margins_native.csv``; default: the fold's.
    """
    console = console or Console()
    plans_file, dataset_file = require_model_folder(fold.folder.parent)
    dataset_json = read_dataset(dataset_file)
    plans = read_configuration(plans_file, fold.configuration, channels=len(channel_names(dataset_json)))
    sd = fold.settings.get("channel_sd")
    if sd is not None and len(sd) != len(channel_names(dataset_json)):
        raise UserError(f"{fold.folder / fold.checkpoint} has {len(sd)} channel_sd, {dataset_file} other channels")
    native = shared_native_scale(plans, fold.configuration, dataset_json, sd)
    rows = margin_rows(fold.ledger, norm=fold.settings["norm"], voxels=fold.voxels, native=native)
    if images is not None:
        require_reader(plans, plans_file)
        for row in rows:
            if _PATH & set(row["case"]):
                raise UserError(f"{fold.folder / fold.checkpoint} has the case {row['case']!r}, a path, not a name")
            scales = native_scale(
                row["case"], images, plans=plans, configuration=fold.configuration, dataset_json=dataset_json,
                channel_sd=sd,
            )  # fmt: skip
            size = fold.ledger.cases[row["case"]].margin
            row.update({f"training_margin_{column}": size * scale for column, scale in scales.items()})
    rows.sort(key=lambda row: fold.ledger.cases[row["case"]].margin)
    table = Table(title=f"{escape(plain(fold.folder))}  ({fold.checkpoint}, after {fold.ledger.epoch} epochs)")
    names = [name for name in (rows[0] if rows else ()) if name != "last_epoch"]
    for name in names:
        heading = escape(name.replace("expanding", "grows").replace("_", " "))
        table.add_column(heading, justify="left" if name == "case" else "right", no_wrap=name == "case")
    hidden = len(rows) - 2 * ENDS
    for index, row in enumerate(rows):
        if hidden <= 1 or index < ENDS or index >= len(rows) - ENDS:
            table.add_row(*(_short(row[name]) for name in names))
        elif index == ENDS:
            table.add_row(f"... {hidden} more", end_section=True)
    console.print(table)
    if sd is not None:
        units = ", ".join(f"{size:.4g} of {name}" for name, size in zip(channel_names(dataset_json), sd, strict=True))
        console.print(f"1 SD in network units: {units}", soft_wrap=True)
    folder = output or fold.folder
    plot = folder / PROGRESS_FILE
    plot_progress(plot, fold.history, fold.ledger, norm=fold.settings["norm"])
    for line in never_searched(fold.ledger):
        console.print(line, soft_wrap=True)
    if fold.history:
        last = fold.history[-1]
        foreground = 1 - last["background_share"]
        if last["below_tau_share"] > FEW_SEARCHED * foreground > 0:
            console.print(
                f"{last['below_tau_share'] / foreground:.0%} of the last epoch's patches with foreground had crossed "
                "without perturbation and were trained without one",
                soft_wrap=True,
            )
        state = "yes" if last["equilibrium"] else "no"
        console.print(
            f"median {last['margin_q50']:.4g} SD per voxel, {last['expanding_share']:.0%} of cases expanding, "
            f"{last['crossed_share']:.0%} of visits crossed; equilibrium: {state}"
        )
    if images is not None:
        write_csv(folder / "ima_margins_native.csv", rows)
        console.print(f"wrote {folder / 'ima_margins_native.csv'}", soft_wrap=True)
    console.print(f"plot: {plot}", soft_wrap=True)
    console.print(
        "Training margins bound the search of a training; what a case tolerates is measured by ima-seg evaluate "
        "--attack minimal",
        soft_wrap=True,
    )


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return escape(plain(value))
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
