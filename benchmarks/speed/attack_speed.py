"""How fast PGD is: this package, other libraries and a plain loop beside the bare network passes.

    python -m benchmarks.speed.attack_speed [--device cpu|cuda] [--rounds 7] [--large] [--quick]

All contenders (``attack_contenders.py``) attack nnU-Net's plain and residual-encoder U-Net, fitted to the batch of
bright blobs that is attacked, with the same budget, steps, step length and loss, from the clean image. The floor is as
many bare float32 forwards, losses and input gradients as there are steps.

Right comes before fast: the loss that each contender reaches is scored in float32 and must not fall short of the plain
loop's by more than 1 %, the perturbation must be within the budget. If one of ours fails, nothing is timed or written.
A library that fails is listed as wrong, without a time; one that is not installed is left out.

Time: all contenders and the floor alternate in one run, in an order that reverses every round; ratios are taken round
by round. Memory: peak beyond network and batch, each in a process of its own. The tables go to standard output and to
``benchmarks/results/attack_speed_DEVICE.md``, the numbers to ``.json`` beside it. ``--quick`` is a trial on one
tiny network per dimension: it measures no memory, holds nothing to a bar and writes nothing.

One file: networks, checks, timing and memory are one protocol, which a reader must see whole to trust a ratio.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import sys
import warnings
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

from benchmarks.shared.measuring import (
    alternate,
    cpu_has_bf16,
    cpu_info,
    number_of_process,
    peak_memory,
    provenance,
    ratio,
    store,
)
from benchmarks.speed.attack_contenders import CONTENDERS, Contender, Problem, alters, floor, plain_loop
from benchmarks.speed.attack_tables import bars, tables
from ima_seg import Labels, Target
from ima_seg.attacks.losses import dice_ce_loss
from ima_seg.attacks.network import full_precision
from ima_seg.ops import perturbation_size
from ima_seg.types import Norm

NETWORKS = ("plain", "residual encoder")
CLASSES = 3
NORMS: tuple[Norm, ...] = ("l2", "linf")
#: Share of the plain loop's loss that a contender may fall short by, and of the budget that it may be over.
SHORT, OVER = 0.01, 1e-4
FLOOR = "floor"


@dataclass(frozen=True)
class Case:
    """A batch and the network it meets.

    Attributes:
        batch: images.
        patch: their size, voxels.
        features: feature maps of the first stage.
        stages: of the network.
        fit: steps of Adam on the batch.
        eps: budget, RMS per voxel (l2) or largest (linf); the loss is far above that of the clean batch, and not yet so
            far that ten steps over- and undershoot from one rounding to the next.
    """

    batch: int
    patch: tuple[int, ...]
    features: int
    stages: int = 4
    fit: int = 60
    eps: float = 0.2


CASES = {"2D 56x40 x16": Case(16, (56, 40), 32), "3D 40x56x40 x2": Case(2, (40, 56, 40), 16)}
LARGE = {"3D 128^3 x2": Case(2, (128, 128, 128), 32)}
QUICK = {"2D 24x24 x4": Case(4, (24, 24), 8, 2, 40, 0.15), "3D 12x12x12 x2": Case(2, (12, 12, 12), 8, 2, 60, 0.15)}
QUICK_NETWORKS = dict(zip(QUICK, reversed(NETWORKS), strict=True))
ALL = {**CASES, **LARGE, **QUICK}


def unet(kind: str, case: Case) -> torch.nn.Module:
    """One of nnU-Net's architectures with deep supervision."""
    dims, stages = len(case.patch), case.stages
    options: dict[str, Any] = {
        "norm_op": torch.nn.InstanceNorm2d if dims == 2 else torch.nn.InstanceNorm3d,
        "norm_op_kwargs": {"affine": True},
        "nonlin": torch.nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": True,
    }
    conv = torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d
    features = [case.features * 2**i for i in range(stages)]
    strides = [1] + [2] * (stages - 1)
    if kind == "plain":
        return PlainConvUNet(1, stages, features, conv, 3, strides, 2, CLASSES, 2, True, **options)
    blocks = [1, 3, 4, 6][:stages]
    return ResidualEncoderUNet(1, stages, features, conv, 3, strides, blocks, CLASSES, 1, True, **options)


def blobs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Two balls, one in the other, somewhere in each image: z-scored images (B, 1, *S) and labels (B, 1, *S)."""
    dims = len(case.patch)
    axes = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in case.patch), indexing="ij")
    centre = (torch.rand(case.batch, dims) - 0.5).view(case.batch, dims, *(1,) * dims)
    radius = (torch.stack(axes) - centre).norm(dim=1, keepdim=True)
    labels = (radius < 0.6).long() + (radius < 0.3)
    images = labels + 0.5 * torch.randn(labels.shape)
    return (images - images.mean()) / images.std(), labels


def build(name: str, kind: str, device: torch.device) -> Problem:
    """Network and batch of a case; the network is as initialised."""
    torch.manual_seed(0)
    network = unet(kind, ALL[name]).to(device).eval()
    x, labels = (each.to(device) for each in blobs(ALL[name]))
    return Problem(network, x, Target.from_raw(labels, Labels(CLASSES)), eps=ALL[name].eps)


@cache
def fitted(name: str, kind: str, device: torch.device) -> Problem:
    """The same after a brief fit to the batch, so that an attack has somewhere to go."""
    problem = build(name, kind, device)
    optimiser = torch.optim.Adam(problem.network.parameters(), 3e-3)
    for _ in range(ALL[name].fit):
        loss = dice_ce_loss(problem.network(problem.x)[0], problem.target).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return problem


def restore(network: torch.nn.Module) -> None:
    """Undo what a contender may have left behind, so that it does not burden the next."""
    network.eval().requires_grad_(True)
    network.zero_grad(set_to_none=True)


@torch.no_grad()
def score(problem: Problem, images: torch.Tensor) -> float:
    """Cross-entropy plus 1 - Dice of a batch in float32, mean over samples: 0 is perfect, so that shares make sense."""
    with full_precision():
        return 1 + float(problem.loss(images).mean())


def judge(problem: Problem, contender: Contender, reference: float) -> dict[str, Any]:
    """What the contender reaches: loss, its difference from the plain loop's, size in budgets, and what is wrong."""
    try:
        images = contender.make(problem)()
        if images.shape != problem.x.shape:
            return {"wrong": f"returns a batch of shape {tuple(images.shape)}"}
    except Exception as error:  # of any library whatever
        return {"wrong": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
    finally:
        restore(problem.network)
    loss = score(problem, images)
    size = float((perturbation_size(images - problem.x, problem.norm) / problem.eps).max())
    found: dict[str, Any] = {
        "loss": round(loss, 4), "loss_difference": round(loss / reference - 1, 5), "size": round(size, 6)
    }  # fmt: skip
    if not size <= 1 + OVER:
        found["wrong"] = f"perturbation of {size:.4f} budgets"
    elif not loss >= reference * (1 - SHORT):
        found["wrong"] = f"loss {loss:.3f}, the plain loop's is {reference:.3f}"
    return found


def measure(problem: Problem, rounds: int, contenders: list[Contender]) -> list[dict[str, Any]]:
    """Loss and time of all contenders on a problem, the floor last.

    Raises:
        SystemExit: one of ours is wrong, or the attack goes nowhere.
    """
    device = problem.x.device
    clean, reference = score(problem, problem.x), score(problem, plain_loop(problem)())
    if not reference - clean > 1.5 * SHORT * reference:
        sys.exit(f"the plain loop gets the loss from {clean:.3f} to {reference:.3f} only; that tells nothing apart")
    rows = []
    for contender in contenders:
        row = {"contender": contender.name}
        if problem.norm not in contender.norms:
            rows.append(row | {"wrong": f"has no attack for {problem.norm}"})
            continue
        row |= judge(problem, contender, reference)
        if "wrong" in row and not contender.peer:
            sys.exit(f"{contender.name}, {problem.norm}: {row['wrong']}; nothing is timed")
        rows.append(row)
    right = {row["contender"] for row in rows if "wrong" not in row}
    jobs = {each.name: each.make(problem) for each in contenders if each.name in right} | {FLOOR: floor(problem)}
    seconds = alternate(jobs, rounds, device, between=lambda: restore(problem.network))
    fastest = min((c.name for c in contenders if c.peer and c.name in right), key=lambda n: _relative(seconds, n))
    for row in rows:
        if (name := row["contender"]) in right:
            row |= ratio(seconds[name], seconds[FLOOR]) | {"seconds": round(statistics.median(seconds[name]), 4)}
            row["to_fastest_peer"] = ratio(seconds[name], seconds[fastest])["ratio"]
    rows.append({"contender": FLOOR, "ratio": 1.0, "seconds": round(statistics.median(seconds[FLOOR]), 4)})
    return [row | {"fastest_peer": row["contender"] == fastest} for row in rows]


def _relative(seconds: dict[str, list[float]], name: str) -> float:
    quotient: float = ratio(seconds[name], seconds[FLOOR])["ratio"]
    return quotient


def peak_of(name: str, kind: str, norm: Any, contender: str, device: torch.device) -> float:
    """Memory in MiB that an attack needs at its peak beyond network and batch; a few steps need what many do.

    Median of three, after one that is not counted: code is loaded and libraries allocate when first needed.
    """
    problem = replace(build(name, kind, device), norm=norm, steps=3)
    makers = {each.name: each.make for each in CONTENDERS} | {FLOOR: floor}
    attack = makers[contender](problem)
    attack()
    needed = []
    for _ in range(3):
        restore(problem.network)
        with peak_memory(device) as peak:
            attack()
        needed.append(peak.mib)
    return statistics.median(needed)


def add_memory(rows: list[dict[str, Any]], device: torch.device, key: tuple[str, str, str]) -> None:
    """Peaks of all rows with a time, and how many image-sized buffers they are above the floor's."""
    case = ALL[key[0]]
    image = case.batch * torch.Size(case.patch).numel() * 4 / 2**20
    timed = [row for row in rows if "seconds" in row]
    for row in timed:
        arguments = ("--device", device.type, "--peak", *key, row["contender"])
        row["memory_mib"] = round(number_of_process(__file__, *arguments), 2)
    for row in timed:
        row["buffers_over_floor"] = round((row["memory_mib"] - timed[-1]["memory_mib"]) / image, 1)


def describe(contenders: list[Contender], device: torch.device) -> list[dict[str, Any]]:
    """Version, wrapper and side effects of each contender."""
    told = []
    for each in contenders:
        try:
            changed: Any = alters(each, device)
        except Exception as error:  # of any library whatever
            changed = [f"{type(error).__name__}: {error}".splitlines()[0][:120]]
        told.append({"contender": each.name, "version": each.version, "wrapper": each.wrapper, "alters": changed})
    return told


def versions(contenders: list[Contender]) -> dict[str, str]:
    """Of what takes part."""
    packages = ["torch", "triton", "ima-seg", *(each.package for each in contenders if each.package)]
    known = {each.metadata["Name"].lower() for each in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in packages if name in known}


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--large", action="store_true", help="3D 128^3 on the CPU too; takes 32 GiB of memory")
    parser.add_argument("--quick", action="store_true", help="two tiny networks, two rounds, no memory, no file")
    parser.add_argument("--peak", nargs=4, metavar=("CASE", "NETWORK", "NORM", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    warnings.filterwarnings("ignore", module=r"(art|foolbox|torchattacks|adv_lib)\b")
    if options.peak:
        print(peak_of(*options.peak, device))
        return
    contenders = [each for each in CONTENDERS if each.version is not None]
    missing = [each.name for each in CONTENDERS if each.version is None]
    names = list(QUICK) if options.quick else [*CASES, *(LARGE if options.large or device.type == "cuda" else {})]
    rounds = 2 if options.quick else options.rounds
    rows: list[dict[str, Any]] = []
    for name in names:
        for kind in [QUICK_NETWORKS[name]] if options.quick else NETWORKS:
            for norm in NORMS:
                print(f"{name}, {kind}, {norm}", file=sys.stderr, flush=True)
                problem = replace(fitted(name, kind, device), norm=norm)
                found = measure(problem, rounds, contenders)
                if not options.quick:
                    add_memory(found, device, (name, kind, norm))
                rows += [{"case": name, "network": kind, "norm": norm, **row} for row in found]
    bf16 = cpu_has_bf16() if device.type == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)
    result = provenance(__file__, device) | {
        "cpu": cpu_info("model name"), "threads": torch.get_num_threads(), "bf16_instructions": bf16,
        "tf32_convolutions": device.type == "cuda" and torch.backends.cudnn.allow_tf32,
        "versions": versions(contenders), "not_installed": missing, "steps": Problem.steps, "eps": ALL[names[0]].eps,
        "rounds": rounds, "contenders": describe(contenders, device), "rows": rows,
        "bars": [] if options.quick else bars(rows, device.type, bf16),
    }  # fmt: skip
    text = tables(result)
    print(text)
    if not options.quick:
        store("attack_speed", device, result, text)


if __name__ == "__main__":
    main()
