"""The course of an IMA training: sums over an epoch, the per-epoch table, the margins table, their files, the log."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ima_seg.files import write_text
from ima_seg.methods.ima import StepReport
from ima_seg.methods.ledger import EpochSummary, MarginLedger
from ima_seg.methods.plots import plot_progress
from ima_seg.methods.ranks import gather
from ima_seg.methods.settings import IMASettings
from ima_seg.types import Norm

MARGINS_FILE = "ima_margins.csv"
HISTORY_FILE = "ima_history.csv"
PROGRESS_FILE = "ima_progress.png"

_SUMS = (
    "clean_loss",
    "adversarial_loss",
    "searched",
    "resting",
    "crossed",
    "background",
    "below",
    "nonfinite",
    "stalled",
)
_COLUMNS = (*_SUMS, "finite_iterations")


class EpochTally:
    """Sums of an epoch's step reports, kept on the device until the epoch ends."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None
        self._host = {"patches": 0, "forwards": 0, "gradients": 0, "training": 0, "dropped": 0}

    def add(self, report: StepReport) -> None:
        """Add one step."""
        values = [getattr(report, name).detach().float().sum() for name in _SUMS]
        # A batch whose loss is not finite counts in neither mean.
        usable = torch.isfinite(values[0] + values[1])
        row = torch.stack([*values, usable.float()])
        row = torch.where(usable | (torch.arange(len(row), device=row.device) > 1), row, 0.0)
        self._sums = row if self._sums is None else self._sums + row
        self._host["patches"] += len(report.crossed)
        self._host["training"] += len(report.crossed) * (1 if report.adversarial is None else 2)
        self._host["forwards"] += report.passes.forwards
        self._host["gradients"] += report.passes.gradients

    def drop(self, patches: int) -> None:
        """Note patches left out for NaN or infinite voxels."""
        self._host["dropped"] += patches

    def totals(self) -> dict[str, float]:
        """Sums over all steps and ranks; a collective call when ``torch.distributed`` is initialised."""
        sums = [0.0] * len(_COLUMNS) if self._sums is None else self._sums.tolist()
        mine = {**self._host, **dict(zip(_COLUMNS, sums, strict=True))}
        parts = gather(mine)
        return {key: math.fsum(part[key] for part in parts) for key in mine}


def history_row(summary: EpochSummary, totals: Mapping[str, float], seconds: float) -> dict[str, Any]:
    """One row of ``ima_history.csv``.

    Margins are per voxel in network units. ``passes_per_sample`` counts the network passes (forwards and input
    gradients) that the perturbations of an epoch took, over all its patches, searched or not; the two training passes
    come on top.
    """
    patches = max(totals["patches"], 1)
    iterations = max(totals["finite_iterations"], 1)
    names = ("margin_q05", "margin_q25", "margin_q50", "margin_q75", "margin_q95")
    return {
        "epoch": summary.epoch,
        **dict(zip(names, summary.quantiles, strict=True)),
        "expanding_share": summary.expanding_share,
        "crossed_share": summary.crossed_share,
        "equilibrium": summary.equilibrium,
        "cases_visited": summary.cases_visited,
        "visits": summary.visits,
        "clean_loss": totals["clean_loss"] / iterations,
        "adversarial_loss": totals["adversarial_loss"] / iterations,
        "seconds": seconds,
        "passes_per_sample": (totals["forwards"] + totals["gradients"]) / patches,
        "forwards_per_sample": totals["forwards"] / patches,
        "gradients_per_sample": totals["gradients"] / patches,
        "training_passes_per_sample": totals["training"] / patches,
        "searched_share": totals["searched"] / patches,
        "resting_share": totals["resting"] / patches,
        "background_share": totals["background"] / patches,
        "below_tau_share": totals["below"] / patches,
        "nonfinite_gradients": int(totals["nonfinite"]),
        "zero_gradients": int(totals["stalled"]),
        "dropped_patches": int(totals["dropped"]),
    }


def margin_rows(ledger: MarginLedger, *, norm: Norm, voxels: int, native: Mapping[str, float]) -> list[dict[str, Any]]:
    """Rows of ``ima_margins.csv``.

    Args:
        ledger: the margins.
        norm: norm of the threat model.
        voxels: image channels x voxels of a training patch, for the L2 norm of the whole perturbation.
        native: native intensity units (HU, scanner units) per network unit of each channel, where they are the same for
            all cases; each adds a column.
    """
    size = "margin_rms" if norm == "l2" else "margin_linf"
    rows = []
    for record in ledger.table():
        row = {"case": record["case"], size: record["margin"]}
        if norm == "l2":
            row["margin_l2"] = record["margin"] * math.sqrt(voxels)
        row |= {f"margin_{column}": record["margin"] * scale for column, scale in native.items()}
        row |= {
            "visits": record["visits"],
            "crossed_share": record["crossed"] / record["visits"] if record["visits"] else float("nan"),
            "expanding": record["expanding"],
            "last_epoch": record["seen"],
        }
        rows.append(row)
    return rows


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``rows`` in one rename, empty where a row lacks a key; floats with 6 significant digits."""
    if not rows:
        return
    buffer = io.StringIO()
    # The first epochs of a resumed training may be of a version that wrote fewer columns.
    names = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(buffer, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_text(path, buffer.getvalue())


def write_course(
    folder: Path,
    history: Sequence[Mapping[str, Any]],
    ledger: MarginLedger,
    *,
    norm: Norm,
    voxels: int,
    native: Mapping[str, float],
) -> None:
    """Write ``ima_margins.csv``, ``ima_history.csv`` and ``ima_progress.png``.

    Args:
        folder: where to.
        history: rows of :func:`history_row`.
        ledger: the margins.
        norm: norm of the threat model.
        voxels: as for :func:`margin_rows`.
        native: as for :func:`margin_rows`.
    """
    write_csv(folder / MARGINS_FILE, margin_rows(ledger, norm=norm, voxels=voxels, native=native))
    write_csv(folder / HISTORY_FILE, history)
    plot_progress(folder / PROGRESS_FILE, history, ledger, norm=norm)


def epoch_line(summary: EpochSummary, row: Mapping[str, Any]) -> str:
    """An epoch in a line of the log; ``row`` is its :func:`history_row`."""
    q05, _, median, _, q95 = summary.quantiles
    visits = f"crossed {summary.crossed_share:.0%} of {summary.visits} visits" if summary.visits else "none visited"
    return (
        f"median {median:.4f} (5-95 %: {q05:.4f}-{q95:.4f}) SD per voxel, expanding "
        f"{summary.expanding_share:.0%} of {summary.cases} cases, {visits}, {row['passes_per_sample']:.1f} search "
        "passes per patch"
    )


def epoch_warnings(row: Mapping[str, Any], settings: IMASettings, epochs: int) -> list[str]:
    """What is wrong in an epoch, given its :func:`history_row` and the length of the training."""
    foreground, tau = 1 - row["background_share"], settings.tau
    failing, remedy = {
        "dice": (f"a Dice below tau = {tau:g}", "lower tau if it stays so"),
        "relative": ("a Dice of 0", "the network has not learnt enough to be attacked"),
        "loss": (f"a loss above tau = {tau:g}", "raise tau if it stays so"),
    }[settings.criterion]
    found = []
    if foreground == 0:
        found.append("no patch of this epoch had foreground, so no margin could be searched")
    elif row["epoch"] >= 0.2 * epochs and row["below_tau_share"] > 0.5 * foreground:
        found.append(
            f"{row['below_tau_share'] / foreground:.0%} of the patches with foreground have {failing} "
            "without any perturbation and are trained without one; " + remedy
        )
    for name, what in (
        ("nonfinite_gradients", "NaN or infinite gradients"),
        ("zero_gradients", "zero gradients"),
        ("dropped_patches", "NaN or infinite voxels (left out of training)"),
    ):
        if row[name]:
            found.append(f"{row[name]} patches with {what} in this epoch")
    return found
