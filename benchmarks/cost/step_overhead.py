"""What an IMA search costs beyond its bare network passes, and what an IMA step needs beyond a standard step's memory.

    python -m benchmarks.cost.step_overhead [--device cpu|cuda]

Time: the boundary search at the paper's K = 20, with a threshold that no sample crosses, so that it makes all of its 20
input gradients and one forward, against the same passes bare (forward, per-sample loss, ``autograd.grad``). The two
alternate in one run; the ratio is the median over pairs. Memory: peak of one IMA step over the peak of one standard
step on the same batch, each in a process of its own on the CPU. A table goes to standard output and to
``benchmarks/results/step_overhead_DEVICE.json``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet

from benchmarks.shared.measuring import alternate, number_of_process, peak_memory, provenance, ratio, store
from ima_seg import IMA, IMASettings, Labels, Target, ThreatModel
from ima_seg.attacks import Problem, SearchSettings, boundary_search
from ima_seg.attacks.losses import dice_ce_loss
from ima_seg.attacks.network import frozen

STEPS = 20
CASES: dict[str, tuple[int, tuple[int, ...], int]] = {
    # name: batch, patch, feature maps of the first stage
    "2D 56x40 x16, 32 features": (16, (56, 40), 32),
    "3D 40x56x40 x2, 16 features": (2, (40, 56, 40), 16),
}
CUDA_CASES = {"3D 128^3 x2, 32 features": (2, (128, 128, 128), 32)}


def make(name: str, device: torch.device) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """nnU-Net's plain U-Net with deep supervision, a random batch, a reference."""
    batch, patch, features = {**CASES, **CUDA_CASES}[name]
    torch.manual_seed(0)
    dims, stages = len(patch), 4
    conv = torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d
    norm = torch.nn.InstanceNorm2d if dims == 2 else torch.nn.InstanceNorm3d
    network = PlainConvUNet(
        1, stages, [features * 2**i for i in range(stages)], conv, 3, [1] + [2] * (stages - 1), 2, 3, 2, True, norm,
        {"affine": True}, nonlin=torch.nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )  # fmt: skip
    x = torch.randn(batch, 1, *patch, device=device)
    y = torch.randint(0, 3, (batch, 1, *patch), device=device)
    return network.to(device), x, y


def bare_passes(network: Any, x: torch.Tensor, target: Target) -> None:
    """The floor: as many passes as the search makes, and nothing else."""
    with frozen(network):
        for _ in range(STEPS):
            leaf = x.clone().requires_grad_(True)
            torch.autograd.grad(dice_ce_loss(network(leaf)[0], target).sum(), leaf)
        with torch.no_grad():
            network(x)


def search(network: Any, x: torch.Tensor, target: Target, norm: Any) -> None:
    """The boundary search, all steps."""
    problem, one = Problem(network, x, target, ThreatModel(norm), precision="fp32"), torch.ones(len(x), device=x.device)
    settings = SearchSettings(steps=STEPS)
    found = boundary_search(problem, 0.1 * one, threshold=-one, clean_quality=one, settings=settings)
    assert found.passes.gradients == STEPS * len(x), "the comparison needs all passes"
    assert not found.crossed.any()


def overhead(name: str, norm: str, device: torch.device, pairs: int) -> dict[str, Any]:
    """Seconds of both and their ratio, pair by pair."""
    network, x, y = make(name, device)
    target = Target.from_raw(y, Labels(3))
    jobs: dict[str, Callable[[], None]] = {
        "search": lambda: search(network, x, target, norm),
        "bare": lambda: bare_passes(network, x, target),
    }
    seconds = alternate(jobs, pairs, device)
    return {
        "case": name, "norm": norm, **ratio(seconds["search"], seconds["bare"]),
        "bare_seconds": round(statistics.median(seconds["bare"]), 3), "pairs": pairs,
    }  # fmt: skip


def one_step(name: str, kind: str, device: torch.device) -> float:
    """Memory in MiB that steps of ``kind`` (``standard``, ``ima``) need at their peak, beyond network and batch."""
    network, x, y = make(name, device)
    optimiser = torch.optim.SGD(network.parameters(), 1e-3)
    settings = IMASettings(
        beta=0.0 if kind == "standard" else 0.5, criterion="dice", tau=0.01, share=1.0, precision="fp32", steps=3
    )
    ima = IMA.from_settings(settings, labels=Labels(3), patch_voxels=x[0].numel(), epochs=10)

    def loss(output: Any, rows: Any) -> torch.Tensor:
        heads = [torch.nn.functional.interpolate(y[rows].float(), head.shape[2:]).long() for head in output]
        terms = [dice_ce_loss(o, Target.from_raw(t, Labels(3))).mean() for o, t in zip(output, heads, strict=True)]
        return torch.stack(terms).mean()

    with peak_memory(device) as peak:
        for _ in range(2):
            optimiser.zero_grad(set_to_none=True)
            report = ima.step(network, x, y, [str(i) for i in range(len(x))], loss=loss)
            assert (report.adversarial is not None) == (kind == "ima")
            optimiser.step()
    return peak.mib


def memory(name: str, device: torch.device) -> dict[str, Any]:
    """Peak memory of both kinds of step, in processes of their own."""
    kinds = ("standard", "ima")
    peak = {kind: number_of_process(__file__, "--device", device.type, "--peak", name, kind) for kind in kinds}
    quotient = round(peak["ima"] / peak["standard"], 3)
    return {"case": name, "standard_mib": round(peak["standard"]), "ima_mib": round(peak["ima"]), "ratio": quotient}


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.peak:
        print(one_step(*options.peak, device))
        return
    names = list({**CASES, **(CUDA_CASES if device.type == "cuda" else {})})
    result: dict[str, Any] = {"time": [], "memory": []}
    print("| case | norm | search / bare passes | min-max |\n|---|---|---|---|")
    for name in names:
        for norm in ("l2", "linf"):
            row = overhead(name, norm, device, options.pairs)
            result["time"].append(row)
            print(f"| {name} | {norm} | {row['ratio']} | {row['ratio_min_max']} |", flush=True)
    print("\n| case | standard step, MiB | IMA step, MiB | ratio |\n|---|---|---|---|")
    for name in names:
        row = memory(name, device)
        result["memory"].append(row)
        print(f"| {name} | {row['standard_mib']} | {row['ima_mib']} | {row['ratio']} |", flush=True)
    store("step_overhead", device, result | provenance(__file__, device))


if __name__ == "__main__":
    main()
