"""What an iteration of adversarial training costs, in standard iterations and in network passes.

    python -m benchmarks.cost.train_cost [--device cpu|cuda] [--quick]

Standard nnU-Net, fixed-noise adversarial training (SAT: PGD of 20 steps), and IMA with the paper's search, the default
and the fast settings train the same network on the same batches, one after the other in every round of one process; a
ratio is the median over rounds. Networks and loss are nnU-Net's: a plain U-Net with deep supervision, Dice +
cross-entropy over its heads, SGD with Nesterov momentum, on CUDA with automatic mixed precision and a gradient scaler.

How much a search costs depends on what it finds. So the network is fitted first, to blobs on noise of which every fifth
patch is empty, and the margins are moved until they stand, as late in a training. The learning rate of the timed
iterations is zero: all the optimiser's work is done, and every contestant keeps meeting the same network.

Nothing is reported unless the state is such a one, all losses are finite, and IMA with beta = 0 has the gradient of the
standard iteration. The tables go to standard output and to ``benchmarks/results/train_cost_DEVICE.md`` and ``.json``;
``--quick`` runs one round of small networks and writes nothing.

One file: every training that is timed, side by side, with what they share.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from benchmarks.shared.measuring import alternate, provenance, ratio, store
from ima_seg import IMA, IMASettings, Labels, Target, ThreatModel
from ima_seg.attacks import Problem, pgd
from ima_seg.methods.ima_settings import FAST
from ima_seg.ops import hard_dice

LABELS = Labels(3)
#: Bars: an IMA iteration may take so many standard ones.
BARS = {"IMA, default": 2.5, "IMA, fast": 2.0}
SIZES = {"delta": 0.02, "eps_max": 0.3}
PAPER = IMASettings(
    steps=20,
    start="random",
    refine="bisection",
    refine_steps=10,
    refine_tolerance=0.0,
    share=1.0,
    precision="fp32",
    **SIZES,
)


@dataclass(frozen=True)
class Case:
    """A network and its batches."""

    batch: int
    patch: tuple[int, ...]
    features: int
    batches: int


CASES = {
    "2D 56x40 x32, 32 features": Case(32, (56, 40), 32, 2),
    "3D 40x56x40 x2, 16 features": Case(2, (40, 56, 40), 16, 3),
}
QUICK = {"2D 28x20 x8, 8 features": Case(8, (28, 20), 8, 2), "3D 20x28x20 x2, 8 features": Case(2, (20, 28, 20), 8, 3)}
Batch = tuple[torch.Tensor, list[torch.Tensor], list[str]]


def blobs(case: Case, generator: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 1, *S) of two touching ellipsoids on noise, z-scored, and their labels; every fifth without any."""
    axes = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in case.patch), indexing="ij"))
    shape = (-1, *(1,) * len(case.patch))
    images, labels = [], []
    for index in range(case.batch):
        label = np.zeros(case.patch, dtype=np.int64)
        # The two patches of a 3D batch take turns, as a batch of 32 does within itself.
        if (index + int(generator.integers(5)) if case.batch < 5 else index) % 5:
            center, size = generator.uniform(-0.4, 0.4, len(case.patch)), generator.uniform(0.25, 0.5, len(case.patch))
            for value, offset in ((1, 0.0), (2, 0.5)):
                moved = (axes - (center + offset * size).reshape(shape)) / (size * (1 - 0.5 * (value == 2))).reshape(
                    shape
                )
                label[(moved**2).sum(0) < 1] = value
        image = generator.normal(size=case.patch) * 0.6 + np.array([0.0, 1.0, 2.0])[label]
        images.append((image - image.mean()) / image.std())
        labels.append(label)
    return torch.tensor(np.stack(images)[:, None], dtype=torch.float32), torch.tensor(np.stack(labels)[:, None])


def heads(y: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The reference at the resolution of each head, as nnU-Net's data loader makes them."""
    result = [y.float()]
    for level in range(1, count):
        size = [n // 2**level for n in y.shape[2:]]
        result.append(torch.nn.functional.interpolate(result[0], size=size, mode="nearest"))
    return result


class Contest:
    """One network, its batches, and everybody who trains it."""

    def __init__(self, case: Case, device: torch.device, rule_out: Callable[[bool, str], None]) -> None:
        torch.manual_seed(0)
        generator = np.random.default_rng(0)
        dims, stages = len(case.patch), 4 if min(case.patch) >= 40 else 3
        conv = torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d
        norm = torch.nn.InstanceNorm2d if dims == 2 else torch.nn.InstanceNorm3d
        self.network = PlainConvUNet(
            1, stages, [case.features * 2**i for i in range(stages)], conv, 3, [1] + [2] * (stages - 1), 2, 3, 2, True,
            norm, {"affine": True}, nonlin=torch.nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
        ).to(device)  # fmt: skip
        self.device, self.case, self.rule_out = device, case, rule_out
        self.batches: list[Batch] = []
        for index in range(case.batches):
            x, y = blobs(case, generator)
            # Four patches a case: their boundaries differ, as those of random crops do.
            ids = [str((index * case.batch + row) % max(case.batches * case.batch // 4, 1)) for row in range(len(x))]
            self.batches.append((x.to(device), [head.to(device) for head in heads(y, stages - 1)], ids))
        compound = DC_and_CE_loss(
            {"batch_dice": dims == 2, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}, weight_ce=1, weight_dice=1,
            dice_class=MemoryEfficientSoftDiceLoss,
        )  # fmt: skip
        weights = np.array([1 / 2**i for i in range(stages - 1)])
        weights[-1] = 0
        self.loss = DeepSupervisionWrapper(compound, weights / weights.sum())
        self.scaler = torch.amp.GradScaler("cuda") if device.type == "cuda" else None
        self.losses: list[torch.Tensor] = []
        self.passes: dict[str, list[float]] = {}
        self._fit()
        self.optimiser = torch.optim.SGD(
            self.network.parameters(), lr=0.0, momentum=0.99, nesterov=True, weight_decay=3e-5
        )
        self.ledger_state = self._equilibrium()

    def amp(self) -> contextlib.AbstractContextManager[Any]:
        """As nnU-Net trains."""
        return torch.autocast("cuda") if self.device.type == "cuda" else contextlib.nullcontext()

    def forward(self, network: torch.nn.Module, x: torch.Tensor) -> Any:
        """Of a training pass."""
        with self.amp():
            return network(x)

    def loss_of(self, target: list[torch.Tensor], output: Any, rows: Any = slice(None)) -> torch.Tensor:
        """nnU-Net's loss over all heads, for some samples of a batch."""
        with self.amp():
            value: torch.Tensor = self.loss(output, [head[rows] for head in target])
        return value

    def backward(self, value: torch.Tensor) -> None:
        """With the gradient scaler, where there is one."""
        (value if self.scaler is None else self.scaler.scale(value)).backward()  # type: ignore[no-untyped-call]

    def clean_dice(self) -> torch.Tensor:
        """Of all patches; NaN without foreground."""
        with torch.no_grad():
            return torch.cat([hard_dice(self.network(x)[0], Target.from_raw(y[0], LABELS)) for x, y, _ in self.batches])

    def _fit(self) -> None:
        optimiser = torch.optim.Adam(self.network.parameters(), 1e-3)
        for _ in range(200):
            for x, y, _ in self.batches:
                optimiser.zero_grad()
                self.loss(self.network(x), y).backward()
                optimiser.step()
            if self.clean_dice().nanquantile(0.1) > 0.75:
                break

    def _equilibrium(self) -> dict[str, Any]:
        # All patches are searched here, so that margins settle soon; the timed trainings begin with them.
        ima = self.ima(IMASettings(beta=0.5, share=1.0, **SIZES))
        summaries = []
        for _ in range(40):
            for x, y, ids in self.batches:
                ima.step(
                    self.network,
                    x,
                    y[0],
                    ids,
                    loss=partial(self.loss_of, y),
                )
            summaries.append(ima.end_epoch())
        dice, summary = self.clean_dice(), summaries[-1]
        share = statistics.mean(summary.crossed_share for summary in summaries[-10:])
        print(f"clean Dice {dice.nanmean():.2f}, median margin {summary.quantiles[2]:.3f}, crossed {share:.0%}")
        self.rule_out(bool((dice[~dice.isnan()] > 0.6).float().mean() > 0.8), "the clean Dice is above tau")
        settled = any(each.equilibrium for each in summaries[-5:])
        self.rule_out(0.1 < share < 0.99 and settled, "margins are in equilibrium and crossings happen")
        return ima.ledger.state_dict()

    def ima(self, settings: IMASettings) -> IMA:
        """Fresh margins."""
        return IMA.from_settings(settings, labels=LABELS, patch_voxels=self.batches[0][0][0].numel(), epochs=100)

    def step(self) -> None:
        """The end of nnU-Net's iteration."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimiser)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        if self.scaler is not None:
            self.scaler.step(self.optimiser)
            self.scaler.update()
        else:
            self.optimiser.step()

    def standard(self) -> None:
        """nnU-Net's iterations."""
        for x, y, _ in self.batches:
            self.optimiser.zero_grad(set_to_none=True)
            value = self.loss_of(y, self.forward(self.network, x))
            self.backward(value)
            self.step()
            self.losses.append(value.detach())
        self.passes["standard"] = [0.0, 0.0, 1.0]

    def sat(self) -> None:
        """Fixed noise: PGD of 20 steps in float32, training on the perturbed batch alone."""
        for x, y, _ in self.batches:
            self.optimiser.zero_grad(set_to_none=True)
            target = Target.from_raw(y[0], LABELS)
            problem = Problem(self.network, x, target, ThreatModel("l2"), precision="fp32")
            hit = pgd(problem, 0.1, steps=20, keep="last")
            value = self.loss_of(y, self.forward(self.network, hit.adversarial))
            self.backward(value)
            self.step()
            self.losses.append(value.detach())
        self.passes["SAT, PGD-20"] = [0.0, 20.0, 1.0]

    def ima_job(self, name: str, settings: IMASettings) -> Callable[[], None]:
        """IMA iterations that all begin with the same margins."""
        ima = self.ima(settings.model_copy(update=SIZES))

        def job() -> None:
            ima.ledger.load_state_dict(self.ledger_state)
            forwards = gradients = 0
            for x, y, ids in self.batches:
                self.optimiser.zero_grad(set_to_none=True)
                report = ima.step(
                    self.network, x, y[0], ids, loss=partial(self.loss_of, y),
                    forward=self.forward, backward=self.backward,
                )  # fmt: skip
                self.step()
                self.losses.append(report.loss)
                forwards, gradients = forwards + report.passes.forwards, gradients + report.passes.gradients
            patches = len(self.batches) * self.case.batch
            self.passes[name] = [forwards / patches, gradients / patches, 2.0]

        return job

    def check(self) -> None:
        """IMA without adversarial loss has the gradient of the standard iteration."""
        x, y, ids = self.batches[0]
        gradients = []
        for plain in (True, False):
            self.network.zero_grad(set_to_none=True)
            if plain:
                self.loss_of(y, self.forward(self.network, x)).backward()  # type: ignore[no-untyped-call]
            else:
                loss = partial(self.loss_of, y)
                self.ima(IMASettings(beta=0.0)).step(self.network, x, y[0], ids, loss=loss, forward=self.forward)
            gradients.append([copy.deepcopy(p.grad) for p in self.network.parameters() if p.grad is not None])
        close = all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*gradients, strict=True))
        self.rule_out(close, "beta = 0 gives the standard gradient")


def measure(name: str, case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """All contestants on one network."""

    def rule_out(good: bool, what: str) -> None:
        if not good:
            sys.exit(f"{name}: it is not so that {what}; no timing is reported")

    contest = Contest(case, device, rule_out)
    contest.check()
    jobs = {"standard": contest.standard, "SAT, PGD-20": contest.sat}
    for who, settings in {"IMA, paper": PAPER, "IMA, default": IMASettings(), "IMA, fast": FAST}.items():
        jobs[who] = contest.ima_job(who, settings)
    seconds = alternate(jobs, rounds, device)
    rule_out(bool(torch.isfinite(torch.stack(contest.losses)).all()), "all losses are finite")
    rows = []
    for who, times in seconds.items():
        forwards, gradients, training = contest.passes[who]
        row = {"who": who, **ratio(times, seconds["standard"]), "seconds": statistics.median(times) / case.batches}
        row |= {"forwards": round(forwards, 2), "gradients": round(gradients, 2), "training_passes": training}
        if who in BARS:
            row |= {"bar": BARS[who], "passed": row["ratio"] <= BARS[who]}
        rows.append(row)
    return {"case": name, "rows": rows, "rounds": rounds, "batches": case.batches}


def table(result: dict[str, Any]) -> str:
    """Markdown of one case."""
    head = "| | standard iterations | min to max | seconds | search: gradients | forwards | bar |"
    lines = [f"### {result['case']}", "", head, "|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        low, high = row["ratio_min_max"]
        bar = f"{row['bar']:g}: {'pass' if row['passed'] else 'FAIL'}" if "bar" in row else ""
        lines.append(
            f"| {row['who']} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} | {row['seconds']:.3f} | "
            f"{row['gradients']:.2f} | {row['forwards']:.2f} | {bar} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small, one round, nothing is written")
    options = parser.parse_args()
    device = torch.device(options.device)
    results, tables = [], []
    for name, case in (QUICK if options.quick else CASES).items():
        results.append(measure(name, case, device, 1 if options.quick else options.rounds))
        tables.append(table(results[-1]))
        print(tables[-1], flush=True)
    if not options.quick:
        origin = provenance(__file__, device)
        text = "\n".join(f"{key}: {value}  " for key, value in origin.items())
        store("train_cost", device, {"cases": results} | origin, "\n".join(tables) + "\n" + text + "\n")


if __name__ == "__main__":
    main()
