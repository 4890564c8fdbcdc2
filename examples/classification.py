"""A classifier trained by IMA beside one trained as usual: accuracy, clean and under attack.

The data are phantoms, made from the seed: a lesion of one of three kinds (solid, hollow, lobulated) in a noisy organ,
in 2D or 3D. Or a file of MedMNIST (https://medmnist.com, 2D or 3D, one class or several labels per image).

    python examples/classification.py --dims 2
    python examples/classification.py --medmnist pneumoniamnist.npz

Share of the test images whose answer is right, under PGD-20 of L2 size eps per voxel in standard deviations, of one run
of the first command (300 test images, one seed; torch 2.15, MONAI 1.6.1; 2026-11-23):

    eps              0    0.02    0.05     0.1    0.15
    standard     0.970   0.660   0.053   0.000   0.000
    IMA          0.960   0.883   0.590   0.053   0.003

and of ``--dims 3 --epochs 15 --test 150``:

    standard     0.940   0.080   0.000   0.000   0.000
    IMA          0.940   0.567   0.053   0.000   0.000

The numbers are in ``benchmarks/results/classification_phantom_2d.json`` and ``_3d.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import monai
import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import DenseNet

import ima_seg
from ima_seg import IMA, Classes, IMASettings, Target, UserError
from ima_seg.attacks import Problem, pgd
from ima_seg.files import write_text

#: The keys of a MedMNIST file that are read.
KEYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class Data:
    """Images (N, C, *S) in network units, and their classes (N,) or labels (N, K)."""

    images: torch.Tensor
    answers: torch.Tensor

    def __getitem__(self, rows: slice) -> Data:
        return Data(self.images[rows], self.answers[rows])


def phantoms(dims: int, count: int, noise: float, generator: torch.Generator) -> Data:
    """Three kinds of lesions in equal numbers, z-scored.

    Args:
        dims: 2 or 3; images of 32 x 32 or 20 x 20 x 20 voxels.
        count: how many.
        noise: standard deviation of the white noise, in units of the organ's contrast.
        generator: source of all of it.
    """

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    edge, ones = (32, 20)[dims - 2], (1,) * dims
    axes = [torch.linspace(-1, 1, edge)] * dims
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # (dims, *S)

    def inside(centre: torch.Tensor, radius: torch.Tensor, sharpness: float) -> torch.Tensor:
        distance = (grid - centre.view(count, dims, *ones)).norm(dim=1)
        return torch.sigmoid(sharpness * (radius - distance))

    answers = torch.arange(count) % 3
    kind = answers.view(-1, *ones)
    centre = uniform(-0.35, 0.35, dims)
    radius = uniform(0.32, 0.45).view(-1, *ones)
    offset = grid - centre.view(count, dims, *ones)
    angle = torch.atan2(offset[:, 0], offset[:, 1]) + uniform(0, 2 * math.pi).view(-1, *ones)
    lobes = torch.where(kind == 2, 1 + 0.35 * torch.cos((5, 3)[dims - 2] * angle), 1.0)
    lesion = inside(centre, radius * lobes, 25.0)
    lesion = lesion - torch.where(kind == 1, 0.8, 0.0) * inside(centre, 0.55 * radius, 25.0)
    organ = inside(uniform(-0.1, 0.1, dims), uniform(0.8, 0.95).view(-1, *ones), 12.0)
    mode = ("bilinear", "trilinear")[dims - 2]
    texture = F.interpolate(
        torch.randn(count, 1, *(6,) * dims, generator=generator), (edge,) * dims, mode=mode, align_corners=True
    )[:, 0]
    white = noise * torch.randn(count, *(edge,) * dims, generator=generator)
    contrast = uniform(0.8, 1.2).view(-1, *ones)
    images = organ + contrast * lesion + 0.2 * texture + white
    flat = images.flatten(1)
    images = (images - flat.mean(1).view(-1, *ones)) / flat.std(1).view(-1, *ones)
    return Data(images[:, None], answers)


def medmnist(file: Path, count: int | None, tested: int | None = None) -> tuple[Data, Data, Classes]:
    """Training and test data of a MedMNIST file, z-scored by the training images, and how to read the outputs.

    Args:
        file: ``.npz``.
        count: of the training images this many at most.
        tested: of the test images this many at most.

    Raises:
        UserError: no such file, or one that is none of MedMNIST's.
    """
    try:
        with np.load(file) as arrays:
            missing = [key for key in KEYS if key not in arrays]
            if missing:
                raise UserError(f"{file} has no {missing[0]!r}; it holds {', '.join(arrays.files)}")
            parts = [torch.from_numpy(arrays[key][: count if "train" in key else tested]) for key in KEYS]
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read as .npz: {error}") from None
    images = [part.float() for part in parts[::2]]
    # (N, *S), or (N, *S, 3) in colour
    images = [part.movedim(-1, 1) if part.ndim == 4 and part.shape[-1] == 3 else part[:, None] for part in images]
    answers = [part.long() for part in parts[1::2]]
    mean, deviation = images[0].mean(), images[0].std()
    several = answers[0].ndim == 2 and answers[0].shape[1] > 1
    classes = Classes(answers[0].shape[1], multilabel=True) if several else Classes(int(answers[0].max()) + 1)
    train, test = (
        Data((part - mean) / deviation, answer if several else answer.flatten())
        for part, answer in zip(images, answers, strict=True)
    )
    return train, test, classes


def cross_entropy(classes: Classes, answers: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The training loss of logits (n, K) for the samples ``rows`` of a batch of this many ``classes``."""
    if classes.multilabel:
        return lambda logits, rows: F.binary_cross_entropy_with_logits(logits, answers[rows].float())
    return lambda logits, rows: F.cross_entropy(logits, answers[rows])


def train(
    data: Data, classes: Classes, settings: IMASettings, *, epochs: int, batch: int, seed: int
) -> torch.nn.Module:
    """A small DenseNet, trained by IMA; with a ``beta`` of 0 as usual."""
    torch.manual_seed(seed)
    channels, dims = data.images.shape[1], data.images.ndim - 2
    network = DenseNet(dims, channels, classes.outputs, init_features=16, growth_rate=12, block_config=(2, 2, 2))
    steps = epochs * math.ceil(len(data.images) / batch)
    optimiser = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    ima = IMA.from_settings(settings, labels=classes, patch_voxels=data.images[0].numel(), epochs=epochs)
    began = time.monotonic()
    for epoch in range(epochs):
        losses = []
        for rows in torch.randperm(len(data.images)).split(batch):
            optimiser.zero_grad()
            x, y = data.images[rows], data.answers[rows]
            report = ima.step(network, x, y, [str(row) for row in rows.tolist()], loss=cross_entropy(classes, y))
            optimiser.step()
            schedule.step()
            losses.append(report.loss)
        summary = ima.end_epoch()
        print(
            f"epoch {epoch + 1}/{epochs}: loss {torch.stack(losses).mean():.3f}, median margin "
            f"{summary.quantiles[2]:.3f}, crossed {summary.crossed_share:.0%}, {time.monotonic() - began:.0f} s",
            file=sys.stderr,
        )
    return network.eval()


def accuracy(network: torch.nn.Module, data: Data, classes: Classes, eps: float) -> float:
    """Share of the images whose answer is wholly right under PGD-20 of L2 size ``eps`` per voxel; 0 is clean."""
    right = 0
    for x, y in zip(data.images.split(100), data.answers.split(100), strict=True):
        problem = Problem(
            network, x, Target.from_raw(y, classes), precision="fp32", generator=torch.Generator().manual_seed(0)
        )
        right += int((pgd(problem, eps, steps=20).damage == 0).sum())
    return right / len(data.images)


def main() -> None:
    """Train both, attack both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, choices=(2, 3), default=2, help="of the phantoms")
    parser.add_argument("--medmnist", type=Path, metavar="FILE.npz", help="read this file instead of making phantoms")
    parser.add_argument("--count", type=int, help="training images, at most (phantoms: 1200 in 2D, 600 in 3D)")
    parser.add_argument("--test", type=int, default=300, help="test images, at most")
    parser.add_argument(
        "--noise", type=float, help="white noise in the phantoms, of the contrast (0.35 in 2D, 0.2 in 3D)"
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--eps-max", type=float, default=0.3, help="cap on margins, L2 per voxel in standard deviations"
    )
    parser.add_argument("--eps", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.15], help="of the attack")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the numbers here too")
    arguments = parser.parse_args()
    if arguments.medmnist:
        data, test, classes = medmnist(arguments.medmnist, arguments.count, arguments.test)
    else:
        generator = torch.Generator().manual_seed(arguments.seed)
        count = arguments.count or (1200, 600)[arguments.dims - 2]
        noise = (0.35, 0.2)[arguments.dims - 2] if arguments.noise is None else arguments.noise
        both = phantoms(arguments.dims, count + arguments.test, noise, generator)
        test, data = both[: arguments.test], both[arguments.test :]
        classes = Classes(3)
    rows = {}
    for name, beta in (("standard", 0.0), ("IMA", 0.5)):
        settings = IMASettings(beta=beta, eps_max=arguments.eps_max)
        network = train(data, classes, settings, epochs=arguments.epochs, batch=arguments.batch, seed=arguments.seed)
        rows[name] = {f"{eps:g}": accuracy(network, test, classes, eps) for eps in [0.0, *arguments.eps]}
    sizes = list(rows["standard"])
    print("eps       " + "".join(f"{size:>8}" for size in sizes))
    for name, row in rows.items():
        print(f"{name:<10}" + "".join(f"{row[size]:>8.3f}" for size in sizes))
    if arguments.output:
        record = {
            "command": f"python examples/classification.py {' '.join(sys.argv[1:])}",
            "date": datetime.date.today().isoformat(),
            "versions": {"ima_seg": ima_seg.__version__, "torch": torch.__version__, "monai": monai.__version__},
            "images": {"training": len(data.images), "test": len(test.images), "shape": list(data.images.shape[1:])},
            "accuracy": rows,
        }
        write_text(arguments.output, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
