"""How near the fused ops come to the memory bandwidth, and what they gain over plain torch.

    python -m benchmarks.speed.ops [--device cpu|cuda] [--rounds 7] [--quick]

Each op runs through its public function under every backend that the device has, beside a plain composition: what is
written without the op, with the same semantics. Random starts of the plain composition come from torch's generator, so
only their size can be checked. Triton's interpreter is never timed.

Right comes before fast: before anything is timed, every op, backend and composition is compared on the very tensors of
the benchmark with the reference in float64. If one is wrong, nothing is timed or written.

Bytes: what an op must move is counted from how often it has to read each input and write each result, with nothing for
values of which there is one per sample. An L2 step reads perturbation and gradient twice, for the length of a step is
known only after all of it was read. The bandwidth is measured in the same rounds, by ``copy_`` between tensors that
together are as large as inputs and results of the op, and counts what is read plus what is written. The share is
(bytes / time) / bandwidth. All cycle through so many sets of tensors that caches keep little from one call for the
next, as in an attack, where a network runs between two steps. What caches keep within a call they may: a second pass
that they serve can push a share above 1.

Time: all alternate in one run, each measurement long enough for the clock. ``call`` is per call when calls follow each
other from Python. On CUDA ``device`` is per call when a graph replays them, without Python's part; there the share is
of that time, and the bars are held to it: the device is what an attack waits for, since networks keep it busy while
Python runs ahead.

The table goes to standard output and to ``benchmarks/results/ops_DEVICE.md``, the numbers to ``.json`` beside it.
``--quick`` is a trial on tiny tensors: it holds nothing to a bar and writes nothing.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.shared.baselines import Results, Tensors, rms
from benchmarks.shared.measuring import alternate, cpu_info, provenance, ratio, rounded, store, wait
from benchmarks.speed.op_cases import PLAIN, Problem, problems
from benchmarks.speed.op_tables import bars, tables
from ima_seg import ops
from ima_seg.errors import UserError
from ima_seg.ops.backend import interpreted

#: Seconds that a measurement lasts at least.
LEAST_SECONDS = 0.02
#: Inputs and results of all sets together: several times what caches of GPUs hold.
ALL_SETS = 2**28
#: Elements that are compared at a time: in float64 the reference needs many times the memory.
COMPARED = 2**22

COPY = "copy_"


def fits(ours: torch.Tensor, exact: torch.Tensor, tolerance: tuple[float, float]) -> None:
    """Raise AssertionError unless they are equal, integers exactly."""
    if not ours.is_floating_point():
        assert torch.equal(ours, exact), f"{int((ours != exact).sum())} of {ours.numel()} values differ"
    else:
        rtol, atol = tolerance
        torch.testing.assert_close(ours.double(), exact.double(), rtol=rtol, atol=atol)


def backends(device: torch.device) -> list[Any]:
    """Those to be timed on the device; Triton's interpreter is not.

    Raises:
        SystemExit: on a GPU, but Triton would interpret.
    """
    if device.type != "cuda":
        return ["reference"]
    if interpreted():
        sys.exit("TRITON_INTERPRET is set: the kernels would run in Triton's interpreter; nothing is timed")
    try:
        with ops.use_backend("triton"):
            ops.resolve_backend(device)
    except UserError as error:
        print(f"only the reference is timed: {error}", file=sys.stderr)
        return ["reference"]
    return ["reference", "triton"]


def contestants(problem: Problem) -> dict[str, tuple[Any, Callable[[Tensors], Results]]]:
    """Backend and function by name."""
    ours: dict[str, Any] = {name: (name, problem.op.ours) for name in backends(problem.device)}
    return ours | {PLAIN: (None, problem.op.plain)}


def run(backend: Any, function: Callable[[Tensors], Results], inputs: Tensors) -> Results:
    """On a backend, or without one."""
    with ops.use_backend(backend) if backend else nullcontext():
        return function(inputs)


@torch.no_grad()
def check(problem: Problem) -> None:
    """Compare all contestants with the float64 reference.

    Raises:
        SystemExit: one is wrong.
    """
    op, inputs = problem.op, problem.inputs()
    found = {name: run(*contestant, inputs) for name, contestant in contestants(problem).items()}
    rows = max(1, COMPARED // math.prod(problem.shape[1:]))
    for begin in range(0, problem.shape[0], rows):
        part = slice(begin, begin + rows)
        some = {name: tensor[part] for name, tensor in inputs.items()}
        exact = op.exact({n: t.double() if t.is_floating_point() else t for n, t in some.items()})
        for name, results in found.items():
            try:
                if op.random and name == PLAIN:
                    size = results[0][part].flatten(1).abs().amax(1) if "linf" in op.name else rms(results[0][part])
                    assert (size.flatten() <= some["radius"] * (1 + op.tolerance[0])).all(), "beyond its radius"
                    continue
                assert len(results) == len(exact), f"{len(results)} results instead of {len(exact)}"
                for ours, true in zip(results, exact, strict=True):
                    fits(ours[part], true, op.tolerance)
            except AssertionError as error:
                told = " ".join(str(error).split())
                sys.exit(f"{op.name}, {problem.case}, {name}: wrong, {told}; nothing is timed")


class Cycle:
    """Calls of a function on one set of inputs after the other; as many results stay alive as there are sets."""

    def __init__(self, function: Callable[[Any], Any], sets: list[Any]) -> None:
        self.function, self.sets, self.turn = function, sets, 0
        self.kept: deque[Any] = deque(maxlen=len(sets))

    def __call__(self, calls: int) -> None:
        for _ in range(calls):
            self.kept.append(self.function(self.sets[self.turn]))
            self.turn = (self.turn + 1) % len(self.sets)


class Replay:
    """The same as a CUDA graph of one cycle: the device alone, without Python's part."""

    def __init__(self, cycle: Cycle) -> None:
        self.length = len(cycle.sets)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            cycle(2 * self.length)  # compiles and allocates what a capture must not
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        cycle.kept.clear()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            cycle(self.length)
        self.kept = list(cycle.kept)  # the graph writes to them
        cycle.kept.clear()

    def __call__(self, calls: int) -> None:
        for _ in range(calls // self.length):
            self.graph.replay()


def enough(job: Callable[[int], None], unit: int, least: float, device: torch.device) -> int:
    """Calls, a multiple of ``unit``, that last at least so many seconds."""
    calls = unit
    job(calls)
    while True:
        wait(device)
        began = time.perf_counter()
        job(calls)
        wait(device)
        took = time.perf_counter() - began
        if took >= least:
            return calls
        calls = unit * math.ceil(calls / unit * min(10.0, max(1.5, 1.2 * least / max(took, 1e-9))))


def time_all(jobs: dict[str, Any], rounds: int, least: float, device: torch.device) -> dict[str, list[float]]:
    """Seconds per call of every job in each round."""
    calls = {name: enough(job, getattr(job, "length", 1), least, device) for name, job in jobs.items()}
    seconds = alternate({name: functools.partial(job, calls[name]) for name, job in jobs.items()}, rounds, device)
    return {name: [each / calls[name] for each in seconds[name]] for name in jobs}


@torch.no_grad()
def measure(problem: Problem, rounds: int, least: float, all_sets: int) -> list[dict[str, Any]]:
    """Times of all contestants, and the bandwidth, in the same rounds."""
    op, device, first = problem.op, problem.device, problem.inputs()
    footprint, moved = op.footprint(first), op.moved(first)
    count = max(1, math.ceil(all_sets / footprint))
    sets = [first, *({name: tensor.clone() for name, tensor in first.items()} for _ in range(count - 1))]
    # A copy of these reads half of the footprint and writes the other half.
    pairs = [torch.zeros(2, max(1, footprint // 8), device=device).unbind() for _ in sets]
    cycles = {
        name: Cycle(functools.partial(run, *contestant), sets) for name, contestant in contestants(problem).items()
    }
    cycles[COPY] = Cycle(lambda pair: pair[1].copy_(pair[0]), pairs)
    times = {"call": time_all(cycles, rounds, least, device)}
    if device.type == "cuda":
        for cycle in cycles.values():
            cycle.kept.clear()
        times["device"] = time_all({name: Replay(cycle) for name, cycle in cycles.items()}, rounds, least, device)
    decisive = times.get("device", times["call"])
    copied = 2 * pairs[0][0].nbytes
    copies = decisive.pop(COPY)
    bandwidth = copied / statistics.median(copies) / 1e9
    as_copied = [each * moved / copied for each in copies]
    rows: list[dict[str, Any]] = []
    for name, seconds in decisive.items():
        share = ratio(as_copied, seconds)
        row: dict[str, Any] = {"op": op.name, "case": problem.case, "implementation": name}
        row |= {f"{kind}_us": round(statistics.median(found[name]) * 1e6, 3) for kind, found in times.items()}
        row |= {
            "to_reference": ratio(seconds, decisive["reference"])["ratio"],
            "bytes": moved, "sets": len(sets),
            "gb_per_s": rounded(moved / statistics.median(seconds) / 1e9), "copy_gb_per_s": rounded(bandwidth),
            "share": share["ratio"], "share_min_max": share["ratio_min_max"],
        }  # fmt: skip
        rows.append(row)
    return rows


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="tiny tensors, two rounds, no file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    posed = list(problems(options.quick, device))
    checked = 0
    for problem in posed:
        if not options.quick:
            print(f"checking {problem.op.name}, {problem.case}", file=sys.stderr, flush=True)
        check(problem)
        checked += len(contestants(problem))
    rounds = 2 if options.quick else options.rounds
    sizes = (0.0, 0) if options.quick else (LEAST_SECONDS, ALL_SETS)
    rows: list[dict[str, Any]] = []
    for problem in posed:
        if not options.quick:
            print(f"timing {problem.op.name}, {problem.case}", file=sys.stderr, flush=True)
        rows += measure(problem, rounds, *sizes)
    result = provenance(__file__, device) | {
        "cpu": cpu_info("model name"), "triton": installed("triton"), "backends": backends(device), "rounds": rounds,
        "checked": checked, "rows": rows, "bars": bars(rows) if device.type == "cuda" and not options.quick else [],
    }  # fmt: skip
    text = tables(result)
    print(text)
    if not options.quick:
        store("ops", device, result, text)


if __name__ == "__main__":
    main()
