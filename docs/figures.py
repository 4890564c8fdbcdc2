"""The figures of the documentation, made by ima_seg itself on phantoms, in minutes on a CPU: python docs/figures.py.

A small U-Net is trained on axial slices of phantoms (``ima_seg.data.phantom``), organ and lesion as one class, first as
usual, then by IMA. Each figure is written twice, for light and for dark pages.

One file: all figures of the site, drawn by one command from one short training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from monai.networks.nets import UNet

from ima_seg import IMA, IMASettings, Labels, Target, ThreatModel
from ima_seg.attacks import Problem, boundary_search, gaussian_noise, pgd
from ima_seg.attacks.losses import dice_ce_loss
from ima_seg.data.phantom import draw_case
from ima_seg.methods.ledger import EpochSummary
from ima_seg.ops import hard_dice

HERE = Path(__file__).parent / "figures"
LABELS = Labels(outputs=2)
THREAT = ThreatModel()
CASES, BATCH, SLICES = 20, 10, 12
ACCENT, WARM, GREEN, GREY, DARK = "#3f7fbf", "#d1603d", "#3c9d6b", "#8a8f98", "#20242b"


class Recorder(torch.nn.Module):
    """A network that notes what it is asked: each perturbation and the Dice there."""

    def __init__(self, network: torch.nn.Module, clean: torch.Tensor, target: Target) -> None:
        super().__init__()
        self.network, self.clean, self.target = network, clean, target
        self.seen: list[torch.Tensor] = []
        self.dice: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(x)
        self.seen.append((x - self.clean).detach().flatten())
        self.dice.append(float(hard_dice(logits.detach(), self.target)))
        return logits


def slices_of(index: int, *, test: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 1, 48, 48), z-scored over the volume, and labels (n, 1, 48, 48) of the slices with most organ."""
    case = draw_case(index, test=test)
    volume = torch.from_numpy(case.images[0].astype(np.float32))
    volume = (volume - volume.mean()) / volume.std()
    label = torch.from_numpy(case.label > 0).long()
    chosen = label.sum((0, 1)).argsort(descending=True)[:SLICES]
    return volume.movedim(2, 0)[chosen][:, None], label.movedim(2, 0)[chosen][:, None]


class Training:
    """Slices of the phantoms, and one network."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.cases = [slices_of(index) for index in range(CASES)]
        self.network = UNet(2, 1, 2, channels=(16, 32, 64), strides=(2, 2), num_res_units=1, norm="instance")
        self.optimiser = torch.optim.Adam(self.network.parameters(), 2e-3)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        chosen = torch.randint(CASES, (BATCH,)).tolist()
        rows = [int(torch.randint(SLICES, ())) for _ in chosen]
        images, labels = (
            torch.stack([self.cases[c][part][r] for c, r in zip(chosen, rows, strict=True)]) for part in (0, 1)
        )
        return images, labels, [f"case {c}" for c in chosen]

    def standard(self, iterations: int) -> None:
        for _ in range(iterations):
            images, labels, _ = self.batch()
            self.optimiser.zero_grad()
            dice_ce_loss(self.network(images), Target.from_raw(labels, LABELS)).mean().backward()
            self.optimiser.step()

    def ima(self, epochs: int, iterations: int) -> tuple[IMA, list[EpochSummary], dict[str, list[float]]]:
        """Go on by IMA; its margins at the end, a summary of each epoch, and the course of each case's margin."""
        images = self.cases[0][0]
        ima = IMA.from_settings(
            IMASettings(precision="fp32"), labels=LABELS, patch_voxels=images[0].numel(), epochs=epochs
        )
        summaries, course = [], {f"case {c}": [] for c in range(CASES)}
        for _ in range(epochs):
            for _ in range(iterations):
                x, y, ids = self.batch()
                target = Target.from_raw(y, LABELS)
                self.optimiser.zero_grad()
                ima.step(
                    self.network, x, y, ids, loss=lambda logits, rows, t=target: dice_ce_loss(logits, t[rows]).mean()
                )
                self.optimiser.step()
            summaries.append(ima.end_epoch())
            for case, margin in zip(course, ima.ledger.get(list(course)).tolist(), strict=True):
                course[case].append(margin)
        return ima, summaries, course


# --- drawing ----------------------------------------------------------------------------------------------------


def both(name: str, draw: Callable[[str], Figure], folder: Path) -> None:
    """Write a figure for light and for dark pages; ``draw`` is given the colour of ink."""
    for mode, ink in (("light", "#25282e"), ("dark", "#d8dbe2")):
        style = {
            "axes.edgecolor": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink, "text.color": ink,
            "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "font.size": 10,
            "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8.5,
            "axes.titlesize": 10.5, "svg.hashsalt": name,
        }  # fmt: skip
        with matplotlib.rc_context(style):
            path = folder / f"{name}-{mode}.svg"
            draw(ink).savefig(path, metadata={"Date": None})
            # matplotlib ends some lines with blanks
            path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))


def picture(axes: Axes, image: torch.Tensor, title: str, contours: list[tuple[torch.Tensor, str]]) -> None:
    """A slice as radiologists look at it, with outlines."""
    axes.imshow(image.squeeze().T, cmap="gray", vmin=-1.5, vmax=3, origin="lower", interpolation="nearest")
    for mask, colour in contours:
        if mask.any():
            axes.contour(mask.squeeze().T.float(), [0.5], colors=colour, linewidths=1.4)
    axes.set_title(title)
    axes.set_axis_off()


def walk(network: torch.nn.Module, folder: Path) -> None:
    """How a boundary search walks: the plane of its walk, and how its bracket is closed."""
    images, labels = slices_of(1, test=True)
    x, target = images[:1], Target.from_raw(labels[:1], LABELS)
    tau, eps = 0.6, 0.06
    # More and shorter steps than the default, whose first one often crosses.
    settings = IMASettings(steps=20).search(delta=0.02, multiple_of=1)
    recorder = Recorder(network, x, target)
    clean = hard_dice(network(x).detach(), target)
    problem = Problem(recorder, x, target, THREAT, precision="fp32", generator=torch.Generator().manual_seed(3))
    found = boundary_search(problem, eps, threshold=torch.tensor([tau]), clean_quality=clean, settings=settings)
    assert bool(found.crossed), "the figure shows a walk that crosses"
    voxels = x.numel() ** 0.5
    steps = next(i for i, dice in enumerate(recorder.dice) if dice < tau) + 1
    path, tries = recorder.seen[:steps], recorder.seen[steps:]
    first = path[-1] / path[-1].norm()
    second = path[0] - (path[0] @ first) * first
    second = second / second.norm()

    def flat(delta: torch.Tensor) -> tuple[float, float]:
        return float(delta @ first) / voxels, float(delta @ second) / voxels

    across, up = np.linspace(-0.025, 0.07, 77), np.linspace(-0.04, 0.065, 85)
    grid = torch.stack([(a * first + u * second) * voxels for u in up.tolist() for a in across.tolist()])
    dice = []
    with torch.no_grad():
        for part in grid.split(512):
            many = Target.from_raw(labels[:1].expand(len(part), -1, -1, -1), LABELS)
            dice += hard_dice(network(x + part.view(-1, *x.shape[1:])), many).tolist()
        shares = torch.linspace(0, 1, 201)
        line = torch.stack([path[-2] + s * (path[-1] - path[-2]) for s in shares]).view(-1, *x.shape[1:])
        many = Target.from_raw(labels[:1].expand(len(line), -1, -1, -1), LABELS)
        along = hard_dice(network(x + line), many)
    landscape = np.asarray(dice).reshape(len(up), len(across))

    def draw(ink: str) -> Figure:
        figure = Figure(figsize=(9.2, 4.1), layout="constrained")
        plane, bracket = figure.subplots(1, 2, width_ratios=(1.15, 1))
        filled = plane.contourf(across, up, landscape, levels=np.linspace(0, 1, 21), cmap="RdYlBu", alpha=0.75)
        plane.set_facecolor("white")
        plane.contour(across, up, landscape, [tau], colors=DARK, linewidths=1.8)
        angle = np.linspace(0, 2 * np.pi, 200)
        plane.plot(eps * np.cos(angle), eps * np.sin(angle), "--", color=DARK, lw=1)
        places = np.asarray([flat(delta) for delta in path])
        plane.plot(*places.T, "-", color=DARK, lw=1.1)
        plane.plot(*places[:-1].T, "o", color="white", mec=DARK, ms=6)
        plane.plot(*places[-1], "o", color=WARM, mec=DARK, ms=7)
        end = flat((found.adversarial - x).flatten())
        plane.plot(*end, "*", color=ACCENT, mec=DARK, mew=0.7, ms=13)
        plane.plot(0, 0, "s", color=DARK, ms=5)
        plane.annotate("clean", (0, 0), (-6, -13), textcoords="offset points", color=DARK, fontsize=9, ha="center")
        plane.annotate("start", places[0], (8, 4), textcoords="offset points", color=DARK, fontsize=9)
        for number, place in enumerate(places[1:], 1):
            plane.annotate(f"{number}", place, (6, 6), textcoords="offset points", color=DARK, fontsize=9)
        plane.set(xlim=(across[0], across[-1]), ylim=(up[0], up[-1]), aspect="equal")
        plane.set(xlabel="SD per voxel (RMS), towards the crossing", ylabel="SD per voxel (RMS), across")
        plane.set_title("Dice in the plane of the walk; line: τ = 0.6; dashed: the margin")
        bar = figure.colorbar(filled, ax=plane, shrink=0.8, ticks=[0, 0.2, 0.4, 0.6, 0.8, 1], label="foreground Dice")
        bar.ax.set_facecolor("white")
        bracket.plot(shares, along, color=GREY, lw=1.4, label="Dice along the line")
        bracket.axhline(tau, color=ink, lw=1, label="τ")
        share = [float((t - path[-2]) @ (path[-1] - path[-2]) / (path[-1] - path[-2]).norm() ** 2) for t in tries]
        bracket.plot([0, 1], [recorder.dice[steps - 2], recorder.dice[steps - 1]], "o", color=ink, label="bracket")
        bracket.plot(share, recorder.dice[steps:], "o", color=WARM, label="tries of the root finder")
        final = (found.adversarial - x).flatten() - path[-2]
        final = float(final @ (path[-1] - path[-2]) / (path[-1] - path[-2]).norm() ** 2)
        bracket.axvline(final, color=ACCENT, ls=":", lw=1.4, label="taken as the boundary")
        for number, (s, value) in enumerate(zip(share, recorder.dice[steps:], strict=True), 1):
            bracket.annotate(f"{number}", (s, value), (6, 5), textcoords="offset points", fontsize=9)
        bracket.set(xlabel="from the last point that held (0) to the first that crossed (1)", ylabel="foreground Dice")
        bracket.set_title(f"Closing the bracket: distance {float(found.distance):.3f} SD per voxel")
        bracket.legend()
        return figure

    both("walk", draw, folder)

    with torch.no_grad():
        logits = [network(batch) for batch in (x, found.adversarial)]
    mask, beyond = [each.argmax(1)[0] for each in logits], float(hard_dice(logits[1], target))

    def show(ink: str) -> Figure:
        figure = Figure(figsize=(9.2, 2.9), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        truth = (labels[:1] > 0, GREEN)
        picture(left, x, f"clean: Dice {float(clean):.2f}", [truth, (mask[0], WARM)])
        picture(middle, found.adversarial, f"just beyond the boundary: Dice {beyond:.2f}", [truth, (mask[1], WARM)])
        difference = (found.adversarial - x).squeeze()
        largest = float(difference.abs().max())
        shown = right.imshow(difference.T, cmap="PuOr", vmin=-largest, vmax=largest, origin="lower")
        right.set_title(f"difference: RMS {float(found.distance):.3f} SD")
        right.set_axis_off()
        figure.colorbar(shown, ax=right, shrink=0.8, label="SD")
        return figure

    both("boundary", show, folder)


def margins(ima: IMA, summaries: list[EpochSummary], course: dict[str, list[float]], folder: Path) -> None:
    """How margins grow and settle."""
    table = np.asarray(list(course.values()))
    settled = next((s.epoch for s in summaries if s.equilibrium), None)

    def draw(ink: str) -> Figure:
        figure = Figure(figsize=(9.2, 3.7), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        epochs = np.arange(1, table.shape[1] + 1)
        for row in table:
            left.plot(epochs, row, color=ACCENT, lw=0.8, alpha=0.55)
        left.plot([], [], color=ACCENT, lw=0.8, label=f"a case ({len(table)})")
        left.plot(epochs, np.median(table, axis=0), color=WARM, lw=2.2, label="median")
        left.axhline(ima.ledger.eps_max, color=ink, ls="--", lw=0.9, label="cap ε_max")
        left.axhline(ima.ledger.delta, color=GREY, ls=":", lw=1.2, label="first margin, step δ")
        left.set(xlabel="epoch", ylabel="margin, SD per voxel (RMS)", ylim=(0, None))
        left.set_title("Each case has its own margin")
        left.legend(loc="upper left", bbox_to_anchor=(0.0, 0.93))
        right.plot(epochs, [s.crossed_share for s in summaries], color=WARM, label="visits that crossed")
        right.plot(epochs, [s.expanding_share for s in summaries], color=GREEN, label="cases whose margin grew")
        for axes in (left, right) if settled is not None else ():
            axes.axvline(settled + 1, color=ink, lw=0.8, ls="-.", label="equilibrium first seen")
        right.set(xlabel="epoch", ylabel="share", ylim=(0, 1.02))
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
        right.set_title("What the visits found, and what it did")
        right.legend(loc="lower right")
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return figure

    both("margins", draw, folder)


def units(network: torch.nn.Module, folder: Path) -> None:
    """The L2 norm of one size per voxel, and what sizes look like."""

    def draw(ink: str) -> Figure:
        figure = Figure(figsize=(7.4, 3.7), layout="constrained")
        axes = figure.subplots()
        voxels = np.geomspace(500, 4e6, 50)
        shapes = {"slice 56×40": 56 * 40, "patch 40×56×40": 40 * 56 * 40, "patch 128³": 128**3}
        for rms, colour in ((0.02, GREEN), (0.1, ACCENT), (15 / (56 * 40) ** 0.5, WARM)):
            axes.loglog(voxels, rms * voxels**0.5, color=colour, label=f"RMS {rms:.3g} SD per voxel")
            for count in shapes.values():
                total = THREAT.to_total(rms, count)
                axes.plot(count, total, "o", color=colour, ms=5)
                axes.annotate(f"{total:.3g}", (count, total), (5, -11), textcoords="offset points", fontsize=8.5)
        for name, count in shapes.items():
            axes.axvline(count, color=GREY, lw=0.7, ls=":")
            axes.annotate(name, (count, 0.17), (3, 2), textcoords="offset points", fontsize=8.5)
        axes.set(xlabel="voxels", ylabel="L2 norm of the whole perturbation, SD", ylim=(0.15, 1500))
        axes.legend(loc="upper left")
        return figure

    both("l2", draw, folder)

    images, labels = slices_of(1, test=True)
    x, target = images[:1], Target.from_raw(labels[:1], LABELS)
    sizes = (0.02, 0.05, 0.1, 0.3)
    shown: list[tuple[str, list[tuple[torch.Tensor, torch.Tensor, str]]]] = []
    for name, attack, options in (("Gaussian noise", gaussian_noise, {}), ("PGD, 20 steps", pgd, {"steps": 20})):
        row = []
        for eps in sizes:
            generator = torch.Generator().manual_seed(0)
            problem = Problem(network, x, target, THREAT, precision="fp32", generator=generator)
            hit = attack(problem, eps, **options)
            with torch.no_grad():
                logits = network(hit.adversarial)
            row.append(
                (hit.adversarial, logits.argmax(1)[0], f"{eps:g} SD: Dice {hard_dice(logits, target).item():.2f}")
            )
        shown.append((name, row))

    def show(ink: str) -> Figure:
        figure = Figure(figsize=(9.2, 5.0), layout="constrained")
        for axes_row, (name, row) in zip(figure.subplots(2, len(sizes)), shown, strict=True):
            for axes, (image, mask, title) in zip(axes_row, row, strict=True):
                picture(axes, image, title, [(labels[:1] > 0, GREEN), (mask, WARM)])
            axes_row[0].text(-0.04, 0.5, name, transform=axes_row[0].transAxes, rotation=90, va="center", ha="right")
        return figure

    both("sizes", show, folder)


def main(arguments: list[str] | None = None) -> None:
    """Train, and draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=HERE, help="folder (default: docs/figures)")
    parser.add_argument("--standard", type=int, default=240, help="iterations of the standard training")
    parser.add_argument("--epochs", type=int, default=60, help="of the IMA training")
    parser.add_argument("--iterations", type=int, default=12, help="of each of its epochs")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    training = Training()
    training.standard(options.standard)
    training.network.eval()
    walk(training.network, options.output)
    units(training.network, options.output)
    training.network.train()
    margins(*training.ima(options.epochs, options.iterations), options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
