"""What an IMA training tells of its margins: columns of the history, lines of the log, the table of cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ima_seg.methods.ledger import EpochSummary, MarginLedger
from ima_seg.methods.settings import IMASettings
from ima_seg.types import Norm

MARGINS_FILE = "ima_margins.csv"
PROGRESS_FILE = "ima_progress.png"


def columns(summary: EpochSummary, totals: Mapping[str, float]) -> dict[str, Any]:
    """The columns of ``ima_history.csv`` that other methods do not have; margins per voxel in network units."""
    patches = max(totals["patches"], 1)
    names = ("margin_q05", "margin_q25", "margin_q50", "margin_q75", "margin_q95")
    return {
        "epoch": summary.epoch,
        **dict(zip(names, summary.quantiles, strict=True)),
        "expanding_share": summary.expanding_share,
        "crossed_share": summary.crossed_share,
        "equilibrium": summary.equilibrium,
        "cases_visited": summary.cases_visited,
        "visits": summary.visits,
        "searched_share": totals["searched"] / patches,
        "background_share": totals["background"] / patches,
        "below_tau_share": totals["below"] / patches,
        "nonfinite_gradients": int(totals["nonfinite"]),
        "zero_gradients": int(totals["stalled"]),
    }


def lines(history: Sequence[Mapping[str, Any]], *, cases: int) -> list[str]:
    """The last epoch in the log; ``cases`` are known."""
    row = history[-1]
    visits = f"crossed {row['crossed_share']:.0%} of {row['visits']} visits" if row["visits"] else "none visited"
    found = [
        f"IMA margins: median {row['margin_q50']:.4f} (5-95 %: {row['margin_q05']:.4f}-{row['margin_q95']:.4f}) SD per "
        f"voxel, expanding {row['expanding_share']:.0%} of {cases} cases, {visits}, {row['passes_per_sample']:.1f} "
        "search passes per patch"
    ]
    if row["equilibrium"] and not any(earlier["equilibrium"] for earlier in history[:-1]):
        found.append("IMA equilibrium: the median margin has stopped growing")
    return found


def warnings(row: Mapping[str, Any], settings: IMASettings, epochs: int) -> list[str]:
    """What is wrong in an epoch of a training of this many ``epochs``."""
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
    for name, what in (("nonfinite_gradients", "NaN or infinite gradients"), ("zero_gradients", "zero gradients")):
        if row[name]:
            found.append(f"{row[name]} patches with {what} in this epoch")
    return found


def changed_cases(known: set[str], current: set[str], delta: float) -> list[str]:
    """How the training cases differ from those ``known`` to a resumed ledger, whose first margin is ``delta``."""
    found = []
    if known and current - known:
        found.append(f"{len(current - known)} cases are new to the margin ledger; they start at {delta:.4g}")
    if gone := sorted(known - current):
        names = ", ".join(gone[:5]) + (", ..." if len(gone) > 5 else "")
        found.append(
            f"{len(gone)} cases of the margin ledger are not among the training cases ({names}); their margins are kept"
        )
    return found


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
