"""What the benchmarks share: alternating timings, peak memory, what machine it was, tables, where results go."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ima_seg.files import write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def module_of(script: str) -> str:
    """``benchmarks.speed.ops`` for the file of that script, as ``python -m`` takes it."""
    return ".".join(Path(script).resolve().relative_to(ROOT).with_suffix("").parts)


def again(script: str, *arguments: str) -> list[str]:
    """The command that runs ``script`` with ``arguments`` in a process of its own, from :data:`ROOT`."""
    return [sys.executable, "-m", module_of(script), *arguments]


def wait(device: torch.device) -> None:
    """Let the device finish."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def alternate(
    jobs: dict[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    between: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every job in each round, one job after the other in each, in an order that reverses every round.

    One more round comes first and warms up. What else the machine does then meets all jobs alike, and neither profits
    from always following the other.

    Args:
        jobs: by name.
        rounds: that are timed.
        device: that the jobs run on.
        between: called after each job, outside the timing.
        clock: in seconds; ``time.process_time`` for those of the CPU, in which a busy machine's other work is not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name in jobs if turn % 2 else reversed(jobs):
            wait(device)
            began = clock()
            jobs[name]()
            wait(device)
            took = clock() - began
            if between is not None:
                between()
            if turn:
                seconds[name].append(took)
    return seconds


def ratio(above: list[float], below: list[float]) -> dict[str, Any]:
    """Median, least and largest of the ratios of two jobs' seconds, round by round."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {
        "ratio": rounded(statistics.median(ratios)),
        "ratio_min_max": [rounded(min(ratios)), rounded(max(ratios))],
    }


def rounded(value: float) -> float:
    """To three decimals; what is smaller than 0.1 to three digits, for no measurement is zero."""
    return round(value, 3) if value >= 0.1 else float(f"{value:.3g}")


def status(field: str) -> float:
    """A memory field of this process, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


@dataclass
class Peak:
    """Filled in by :func:`peak_memory`."""

    mib: float = 0.0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Memory that the block needs at its peak, beyond what is there when it begins."""
    peak = Peak()
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status("VmRSS")
        yield peak
        peak.mib = status("VmHWM") - before
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        yield peak
        peak.mib = torch.cuda.max_memory_allocated() / 2**20 - before


def number_of_process(script: str, *arguments: str) -> float:
    """The number that ``script`` prints when run with ``arguments`` in a process of its own: its peak memory."""
    # Every large tensor in a mapping of its own: the peak then counts tensors, not the heap's fragmentation.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        again(script, *arguments), check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    return float(done.stdout)


def cpu_info(field: str) -> str:
    """A field of the first processor (Linux), empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == field), "")


def cpu_has_bf16() -> bool:
    """Whether the CPU has instructions that compute in bfloat16."""
    return bool({"avx512_bf16", "amx_bf16"} & set(cpu_info("flags").split()))


def command_line(script: str) -> str:
    """The command that runs, with file names only: a path says nothing to a reader."""
    return " ".join(["python", "-m", module_of(script), *(Path(a).name for a in sys.argv[1:])])


def provenance(script: str, device: torch.device) -> dict[str, Any]:
    """How a result came about: command, device, version of torch, date."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {
        "command": " ".join(["python", "-m", module_of(script), *sys.argv[1:]]),
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def store(name: str, device: torch.device, result: dict[str, Any], text: str | None = None) -> None:
    """Write ``benchmarks/results/NAME_DEVICE.json`` and, with a ``text`` of tables, the ``.md`` beside it."""
    if text is not None:
        write_text(RESULTS / f"{name}_{device.type}.md", text)
    write_text(RESULTS / f"{name}_{device.type}.json", json.dumps(result, indent=2) + "\n")


def table(head: list[str], body: list[list[Any]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def bar_table(keys: tuple[str, ...], bars: list[dict[str, Any]]) -> str:
    """Markdown: of every bar what is under ``keys``, and whether it was passed."""
    return table([*keys, ""], [[*(bar[key] for key in keys), "pass" if bar["pass"] else "**fail**"] for bar in bars])
