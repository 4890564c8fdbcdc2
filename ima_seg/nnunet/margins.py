"""``ima-seg margins``: the margins of a trained model, printed and plotted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ima_seg.errors import UserError
from ima_seg.files import write_csv
from ima_seg.methods.ledger import MarginLedger
from ima_seg.methods.margins import PROGRESS_FILE, margin_rows
from ima_seg.methods.plots import plot_progress
from ima_seg.nnunet.checkpoint import KEY, read_checkpoint, restore_ledger
from ima_seg.nnunet.dataset import read_description
from ima_seg.nnunet.intensity import native_scale, shared_native_scale

#: The one that training goes on from comes first.
_CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
#: Of many cases, so many with the smallest and with the largest margins are printed.
ENDS = 12


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


def read_margins(
    model_folder: str | Path, folds: Sequence[str] | None = None, *, trust: bool = False
) -> list[FoldMargins]:
    """The margins of every fold of a model folder (or of the ``folds`` named).

    Raises:
        UserError: no such folder or fold, or a checkpoint without a margin ledger.
    """
    model = Path(model_folder)
    if not model.is_dir():
        raise UserError(f"model folder {model} does not exist")
    folders = [model / f"fold_{fold}" for fold in folds] if folds else sorted(model.glob("fold_*"))
    if not folders:
        raise UserError(f"model folder {model} has no fold_*; name the folder that holds plans.json")
    found = []
    for folder in folders:
        name = next((name for name in _CHECKPOINTS if (folder / name).is_file()), None)
        if name is None:
            raise UserError(f"{folder} has no checkpoint; train the fold first")
        checkpoint = read_checkpoint(folder / name, trust=trust)
        state = checkpoint.get(KEY)
        if state is None:
            raise UserError(f"{folder / name} holds no margin ledger; it was trained by {checkpoint['trainer_name']}")
        ledger, configuration = restore_ledger(state), str(checkpoint["init_args"]["configuration"])
        settings, history, voxels = state["settings"], state["history"], int(state["voxels"])
        found.append(FoldMargins(folder, name, ledger, settings, history, voxels, configuration))
    return found


def show_margins(
    fold: FoldMargins, *, images: Path | None = None, output: Path | None = None, console: Console | None = None
) -> None:
    """Print one fold's margins, widest last (of many cases both ends only), and write its plot.

    A folder of the training ``images`` adds the margins in native intensity units. ``output`` is a folder for
    ``ima_progress.png`` and, with ``images``, ``ima_margins_native.csv``; default: the fold's.
    """
    console = console or Console()
    plans, dataset_json = (read_description(fold.folder.parent / name) for name in ("plans.json", "dataset.json"))
    native = shared_native_scale(plans, fold.configuration, dataset_json)
    rows = margin_rows(fold.ledger, norm=fold.settings["norm"], voxels=fold.voxels, native=native)
    if images is not None:
        for row in rows:
            scales = native_scale(
                row["case"], images, plans=plans, configuration=fold.configuration, dataset_json=dataset_json
            )
            size = fold.ledger.cases[row["case"]].margin
            row.update({f"margin_{column}": size * scale for column, scale in scales.items()})
    rows.sort(key=lambda row: fold.ledger.cases[row["case"]].margin)
    table = Table(title=f"{escape(str(fold.folder))}  ({fold.checkpoint}, after {fold.ledger.epoch} epochs)")
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
    folder = output or fold.folder
    plot = folder / PROGRESS_FILE
    plot_progress(plot, fold.history, fold.ledger, norm=fold.settings["norm"])
    if fold.history:
        last = fold.history[-1]
        state = "yes" if last["equilibrium"] else "no"
        console.print(
            f"median {last['margin_q50']:.4g} SD per voxel, {last['expanding_share']:.0%} of cases expanding, "
            f"{last['crossed_share']:.0%} of visits crossed; equilibrium: {state}"
        )
    if images is not None:
        write_csv(folder / "ima_margins_native.csv", rows)
        console.print(f"wrote {folder / 'ima_margins_native.csv'}", soft_wrap=True)
    console.print(f"plot: {plot}", soft_wrap=True)


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return escape(str(value))
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
