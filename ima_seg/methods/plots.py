"""``ima_progress.png``: how the margins grew, where they are, and whether they still grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ima_seg.files import replacing
from ima_seg.methods.ledger import MarginLedger
from ima_seg.types import Norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_progress(
    path: str | Path,
    history: Sequence[Mapping[str, Any]],
    ledger: MarginLedger,
    *,
    norm: Norm,
) -> None:
    """Draw the course of a training.

    Args:
        path: PNG to write, in one rename.
        history: rows of ``ima_history.csv``.
        ledger: the margins now, their step and cap.
        norm: norm of the threat model, for the unit on the axes.
    """
    from matplotlib import style

    # nnU-Net sets seaborn's fonts for the whole process when it draws its own progress.png.
    with style.context("default"), replacing(path) as temporary:
        _figure(history, ledger, norm).savefig(temporary, dpi=100)


def _figure(history: Sequence[Mapping[str, Any]], ledger: MarginLedger, norm: Norm) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    margins = [record.margin for record in ledger.cases.values()]
    delta, eps_max = ledger.delta, ledger.eps_max
    unit = "SD per voxel (RMS)" if norm == "l2" else "SD (largest absolute value)"
    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    (course, histogram), (shares, losses) = figure.subplots(2, 2)
    epochs = [row["epoch"] for row in history]
    dot = "o" if len(epochs) == 1 else None

    def column(name: str) -> list[float]:
        return [float(row[name]) for row in history]

    course.fill_between(
        epochs, column("margin_q05"), column("margin_q95"), color="C0", alpha=0.15, lw=0, label="5-95 % of cases"
    )
    course.fill_between(
        epochs, column("margin_q25"), column("margin_q75"), color="C0", alpha=0.3, lw=0, label="25-75 %"
    )
    course.plot(epochs, column("margin_q50"), color="C0", marker=dot, label="median")
    course.axhline(delta, color="grey", linestyle=":", label=f"first margin, step δ = {delta:.3g}")
    course.axhline(eps_max, color="black", linestyle="--", linewidth=0.8, label=f"cap ε_max = {eps_max:.3g}")
    course.set(title="Margins over epochs", xlabel="epoch", ylabel=f"margin, {unit}", ylim=(0, None))

    histogram.hist(margins, bins=30, color="C0")
    histogram.axvline(delta, color="grey", linestyle=":")
    if margins and max(margins) > 0.8 * eps_max:
        histogram.axvline(eps_max, color="black", linestyle="--", linewidth=0.8)
    histogram.set(
        title=f"Margins of {len(margins)} cases now", xlabel=f"margin, {unit}", ylabel="cases", xlim=(0, None)
    )

    shares.plot(epochs, column("expanding_share"), marker=dot, color="C2", label="cases whose margin still grows")
    shares.plot(epochs, column("crossed_share"), marker=dot, color="C3", label="visits that crossed")
    shares.plot(
        epochs, column("below_tau_share"), marker=dot, color="C7", linewidth=1, label="patches with clean Dice below τ"
    )
    settled = next((row["epoch"] for row in history if row["equilibrium"]), None)
    if settled is not None:
        shares.axvline(settled, color="C2", linestyle="--", label=f"equilibrium first seen, epoch {settled}")
    shares.set(title="Equilibrium", xlabel="epoch", ylabel="share", ylim=(-0.02, 1.02))
    shares.yaxis.set_major_formatter(PercentFormatter(1.0))

    losses.plot(epochs, column("clean_loss"), marker=dot, color="C0", label="clean loss")
    losses.plot(epochs, column("adversarial_loss"), marker=dot, color="C3", label="adversarial loss")
    losses.set(title="Losses and cost", xlabel="epoch", ylabel="training loss")
    cost = losses.twinx()
    cost.plot(epochs, column("passes_per_sample"), color="C1", linewidth=1, linestyle="-.", label="passes (right)")
    cost.set(ylabel="search passes per patch", ylim=(0, None))
    lines = [*losses.get_lines(), *cost.get_lines()]
    losses.legend(lines, [str(line.get_label()) for line in lines], fontsize=8)
    for axes in (course, shares):
        axes.legend(fontsize=8)
    for axes in (course, shares, losses):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    return figure
