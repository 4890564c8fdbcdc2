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


def plot_progress(path: str | Path, history: Sequence[Mapping[str, Any]], ledger: MarginLedger, *, norm: Norm) -> None:
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

    def column(name: str) -> list[float]:
        return [float(row[name]) for row in history]

    def draw(axes: Any, name: str, label: str, **style: Any) -> None:
        axes.plot(epochs, column(name), marker="o" if len(epochs) == 1 else None, label=label, **style)

    for low, high, alpha in ((5, 95, 0.15), (25, 75, 0.3)):
        lower, upper = column(f"margin_q{low:02}"), column(f"margin_q{high}")
        course.fill_between(epochs, lower, upper, color="C0", alpha=alpha, lw=0, label=f"{low}-{high} % of cases")
    draw(course, "margin_q50", "median", color="C0")
    course.axhline(delta, color="grey", linestyle=":", label=f"first margin, step δ = {delta:.3g}")
    course.axhline(eps_max, color="black", linestyle="--", linewidth=0.8, label=f"cap ε_max = {eps_max:.3g}")
    course.set(title="Training margins over epochs", xlabel="epoch", ylabel=f"margin, {unit}", ylim=(0, None))

    histogram.hist(margins, bins=30, color="C0")
    histogram.axvline(delta, color="grey", linestyle=":")
    if margins and max(margins) > 0.8 * eps_max:
        histogram.axvline(eps_max, color="black", linestyle="--", linewidth=0.8)
    histogram.set(
        title=f"Margins of {len(margins)} cases now", xlabel=f"margin, {unit}", ylabel="cases", xlim=(0, None)
    )

    draw(shares, "expanding_share", "cases whose margin still grows", color="C2")
    draw(shares, "crossed_share", "visits that crossed", color="C3")
    draw(shares, "below_tau_share", "patches with clean Dice below τ", color="C7", linewidth=1)
    settled = next((row["epoch"] for row in history if row["equilibrium"]), None)
    if settled is not None:
        shares.axvline(settled, color="C2", linestyle="--", label=f"equilibrium first seen, epoch {settled}")
    shares.set(title="Equilibrium", xlabel="epoch", ylabel="share", ylim=(-0.02, 1.02))
    shares.yaxis.set_major_formatter(PercentFormatter(1.0))

    draw(losses, "clean_loss", "clean loss", color="C0")
    draw(losses, "adversarial_loss", "adversarial loss", color="C3")
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
