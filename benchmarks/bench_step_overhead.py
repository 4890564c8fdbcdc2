"""What an IMA search costs beyond its bare network passes, and what an IMA step needs beyond a standard step's memory.

    python benchmarks/bench_step_overhead.py [--device cpu|cuda]

Time: the boundary search at the paper's K = 20, with a threshold that no sample crosses, so that it makes all of its 20
input gradients and one forward, against the same passes bare (forward, per-sample loss, ``autograd.grad``). The two
alternate in one run; the ratio is the median over pairs. Memory: peak of one IMA step over the peak of one standard
step on the same batch, each in a process of its own on the CPU. A table goes to standard output and to
``benchmarks/results/step_overhead_DEVICE.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet

from ima_seg import IMA, IMASettings, Labels, Target, ThreatModel
from ima_seg.attacks import SearchSettings, boundary_search
from ima_seg.files import write_text
from ima_seg.losses import dice_ce_loss
from ima_seg.model import frozen

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


def wait(device: torch.device) -> None:
    """Let the device finish."""
    if device.type == "cuda":
        torch.cuda.synchronize()


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
    eps = torch.full((len(x),), 0.1, device=x.device)
    found = boundary_search(
        network, x, target, eps=eps, threshold=-torch.ones_like(eps), clean_dice=torch.ones_like(eps),
        settings=SearchSettings(steps=STEPS), threat=ThreatModel(norm),
    )  # fmt: skip
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
    seconds: dict[str, list[float]] = {key: [] for key in jobs}
    for pair in range(pairs + 1):
        for key in jobs if pair % 2 else reversed(jobs):
            wait(device)
            began = time.perf_counter()
            jobs[key]()
            wait(device)
            if pair:  # the first pair warms up
                seconds[key].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(seconds["search"], seconds["bare"], strict=True)]
    return {
        "case": name, "norm": norm, "ratio": round(statistics.median(ratios), 3),
        "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
        "bare_seconds": round(statistics.median(seconds["bare"]), 3), "pairs": pairs,
    }  # fmt: skip


def status(field: str) -> float:
    """A memory field of this process, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def one_step(name: str, kind: str, device: torch.device) -> float:
    """Memory in MiB that steps of ``kind`` (``standard``, ``ima``) need at their peak, beyond network and batch."""
    network, x, y = make(name, device)
    optimiser = torch.optim.SGD(network.parameters(), 1e-3)
    settings = IMASettings(beta=0.0 if kind == "standard" else 0.5, tau=0.01, precision="fp32", steps=3)
    ima = IMA.from_settings(settings, labels=Labels(3), patch_voxels=x[0].numel(), epochs=10)

    def loss(output: Any) -> torch.Tensor:
        heads = [torch.nn.functional.interpolate(y.float(), head.shape[2:]).long() for head in output]
        terms = [dice_ce_loss(o, Target.from_raw(t, Labels(3))).mean() for o, t in zip(output, heads, strict=True)]
        return torch.stack(terms).mean()

    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of importing
        before = status("VmRSS")
    else:
        before = torch.cuda.memory_allocated() / 2**20
    for _ in range(2):
        optimiser.zero_grad(set_to_none=True)
        report = ima.step(network, x, y, [str(i) for i in range(len(x))], loss=loss)
        assert (report.adversarial is not None) == (kind == "ima")
        optimiser.step()
    return (status("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated() / 2**20) - before


def memory(name: str, device: torch.device) -> dict[str, Any]:
    """Peak memory of both kinds of step, in processes of their own."""
    peak = {}
    # Every large tensor in a mapping of its own: the peak then counts tensors, not the heap's fragmentation.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    for kind in ("standard", "ima"):
        command = [sys.executable, __file__, "--device", device.type, "--peak", name, kind]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        peak[kind] = float(done.stdout)
    ratio = round(peak["ima"] / peak["standard"], 3)
    return {"case": name, "standard_mib": round(peak["standard"]), "ima_mib": round(peak["ima"]), "ratio": ratio}


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
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    result |= {
        "command": " ".join(["python", "benchmarks/bench_step_overhead.py", *sys.argv[1:]]),
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "date": datetime.now(timezone.utc).date().isoformat(),
    }  # fmt: skip
    path = Path(__file__).parent / "results" / f"step_overhead_{device.type}.json"
    write_text(path, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
