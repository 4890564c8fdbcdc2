"""What an IMA training tells of its margins: columns of the history, lines of the log, the table of cases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from ima_seg.errors import UserError
from ima_seg.files import write_csv
from ima_seg.methods.base import Method, R
from ima_seg.methods.ima_settings import IMASettings
from ima_seg.methods.ledger import MarginLedger
from ima_seg.methods.ledger_records import EpochSummary
from ima_seg.methods.plots import plot_progress
from ima_seg.types import Norm

MARGINS_FILE = "ima_margins.csv"
PROGRESS_FILE = "ima_progress.png"
#: Of patches with foreground, so many that cannot be searched are warned of.
FEW_SEARCHED = 0.25
#: Other warnings come this often in a training.
REMINDERS = 10


class WithMargins(Method[IMASettings, R]):
    """The part of IMA that is not its step."""

    name, settings_class, uses_cases = "IMA", IMASettings, True
    losses = ("clean_loss", "adversarial_loss")
    counts = ("searched", "background", "below", "nonfinite", "stalled")
    metrics = ("margin_q05", "margin_q50", "margin_q95", "expanding_share", "crossed_share", "passes_per_sample")
    ledger: MarginLedger

    @override
    def end_epoch(self) -> EpochSummary:
        """Move the margins; a collective call when ``torch.distributed`` is initialised."""
        return self.ledger.step()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"ledger": self.ledger.state_dict()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "ledger" not in state:
            raise UserError(f"the checkpoint is of a training by {state.get('method', 'another method')}, not by IMA")
        self.ledger.load_state_dict(state["ledger"])

    saved, restore = state_dict, load_state_dict

    @override
    def sizes(self) -> dict[str, float]:
        return {"delta": self.ledger.delta, "eps_max": self.ledger.eps_max}

    @override
    def absent(self) -> str:
        return f"no margin ledger; all margins start anew at {self.ledger.delta:.4g}"

    @override
    def enter_cases(self, cases: Iterable[str]) -> list[str]:
        known, current = set(self.ledger.cases), {str(case) for case in cases}
        self.ledger.register(sorted(current))
        found = []
        if known and current - known:
            new = len(current - known)
            found.append(f"{new} cases are new to the margin ledger; they start at {self.ledger.delta:.4g}")
        if gone := sorted(known - current):
            names = ", ".join(gone[:5]) + (", ..." if len(gone) > 5 else "")
            found.append(
                f"{len(gone)} cases of the margin ledger are not among the training cases ({names}); their margins are "
                "kept"
            )
        return found

    @override
    def columns(self, totals: Mapping[str, float]) -> dict[str, Any]:
        summary, patches = self.end_epoch(), max(totals["patches"], 1)
        names = ("margin_q05", "margin_q25", "margin_q50", "margin_q75", "margin_q95")
        kept = ("expanding_share", "crossed_share", "equilibrium", "shrinking", "at_cap_share", "never_searched",
                "cases_visited", "visits")  # fmt: skip
        return {
            "epoch": summary.epoch,
            **dict(zip(names, summary.quantiles, strict=True)),
            **{name: getattr(summary, name) for name in kept},
            "searched_share": totals["searched"] / patches,
            "background_share": totals["background"] / patches,
            "below_tau_share": totals["below"] / patches,
            "nonfinite_gradients": int(totals["nonfinite"]),
            "zero_gradients": int(totals["stalled"]),
        }

    @override
    def lines(self, history: Sequence[Mapping[str, Any]]) -> list[str]:
        row = history[-1]
        visits = f"crossed {row['crossed_share']:.0%} of {row['visits']} visits" if row["visits"] else "none visited"
        found = [
            f"IMA training margins: median {row['margin_q50']:.4f} (5-95 %: {row['margin_q05']:.4f}-"
            f"{row['margin_q95']:.4f}) SD per voxel, expanding {row['expanding_share']:.0%} of "
            f"{len(self.ledger.cases)} cases, {visits}, {row['passes_per_sample']:.1f} search passes per patch"
        ]
        if row["equilibrium"] and not any(earlier["equilibrium"] for earlier in history[:-1]):
            found.append("IMA equilibrium: the median margin has stopped growing")
        return found

    @override
    def warnings(self, row: Mapping[str, Any]) -> list[str]:
        foreground, epoch = 1 - row["background_share"], row["epoch"]
        found = []
        if foreground == 0:
            found.append("no patch of this epoch had foreground, so no margin could be searched")
        # In the first epoch a network from scratch knows nothing yet.
        elif epoch >= 1 and row["below_tau_share"] > FEW_SEARCHED * foreground:
            failing, remedy = self._failing()
            found.append(
                f"{row['below_tau_share'] / foreground:.0%} of the patches with foreground have {failing} "
                "without any perturbation and are trained without one, as by standard training; " + remedy
            )
        if epoch == 1 or (epoch > 1 and (epoch + 1) % max(self.epochs // REMINDERS, 1) == 0):
            found += never_searched(self.ledger)
            if row["at_cap_share"] > 0.5:
                found.append(
                    f"{row['at_cap_share']:.0%} of the margins are at the cap of {self.ledger.eps_max:.4g} SD per "
                    "voxel, so that they no longer tell the cases apart; raise eps_max to let them grow"
                )
        if row["shrinking"]:
            found.append(
                f"the median margin has lost a quarter in {self.ledger.patience} epochs, to {row['margin_q50']:.4g}: "
                "the network bears less than before; a lower learning rate or a smaller delta may help"
            )
        for name, what in (("nonfinite_gradients", "NaN or infinite gradients"), ("zero_gradients", "zero gradients")):
            if row[name]:
                found.append(f"{row[name]} patches with {what} in this epoch")
        return found

    def _failing(self) -> tuple[str, str]:
        """What patches are that have crossed without perturbation, and what helps."""
        tau = self.settings.tau
        return {
            "dice": (f"a Dice below tau = {tau:g}", "lower tau, or take the criterion 'relative'"),
            "relative": (
                "a Dice of 0",
                "the network has not learnt enough to be attacked: start from a standard model",
            ),
            "loss": (f"a loss above tau = {tau:g}", "raise tau"),
        }[self.settings.criterion]

    @override
    def write_files(
        self, folder: Path, history: Sequence[Mapping[str, Any]], *, voxels: int, native: Mapping[str, float]
    ) -> None:
        """Write ``ima_margins.csv``, ``ima_history.csv`` and ``ima_progress.png``."""
        super().write_files(folder, history, voxels=voxels, native=native)
        norm = self.settings.norm
        write_csv(folder / MARGINS_FILE, margin_rows(self.ledger, norm=norm, voxels=voxels, native=native))
        plot_progress(folder / PROGRESS_FILE, history, self.ledger, norm=norm)


def never_searched(ledger: MarginLedger) -> list[str]:
    """Which cases have been drawn but never searched so far, and why, a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for case, record in sorted(ledger.cases.items()):
        if record.obstacle and (record.below or record.background):
            reasons.setdefault(record.obstacle, []).append(case)
    return [
        f"{len(cases)} cases have never been searched, for {why}: {', '.join(cases[:5])}{', ...' * (len(cases) > 5)}"
        for why, cases in reasons.items()
    ]


def margin_rows(ledger: MarginLedger, *, norm: Norm, voxels: int, native: Mapping[str, float]) -> list[dict[str, Any]]:
    """Rows of ``ima_margins.csv``.

    Args:
        ledger: the margins.
        norm: norm of the threat model.
        voxels: image channels x voxels of a training patch, for the L2 norm of the whole perturbation.
        native: native intensity units (HU, scanner units) per network unit of each channel, where they are the same for
            all cases; each adds a column.
    """
    size = "training_margin_rms" if norm == "l2" else "training_margin_linf"
    rows = []
    for record in ledger.table():
        row = {"case": record["case"], size: record["margin"]}
        if norm == "l2":
            row["training_margin_l2"] = record["margin"] * math.sqrt(voxels)
        row |= {f"training_margin_{column}": record["margin"] * scale for column, scale in native.items()}
        row |= {
            "visits": record["visits"],
            "crossed_share": record["crossed"] / record["visits"] if record["visits"] else float("nan"),
            "expanding": record["expanding"],
            "last_epoch": record["seen"],
            "never_searched_because": ledger.cases[record["case"]].obstacle,
        }
        rows.append(row)
    return rows
