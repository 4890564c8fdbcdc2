"""How near the fused ops come to the memory bandwidth, and what they gain over plain torch.

    python benchmarks/ops.py [--device cpu|cuda] [--rounds 7] [--quick]

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
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from attack_tables import table
from common import RESULTS, alternate, cpu_info, provenance, ratio, store, wait

from ima_seg import Labels, Target, ops
from ima_seg.errors import UserError
from ima_seg.files import write_text
from ima_seg.ops import reference
from ima_seg.ops.backend import interpreted
from ima_seg.types import Norm

Tensors = dict[str, torch.Tensor]
Results = tuple[torch.Tensor, ...]

#: Batch, channel and space; logits have as many channels as there are classes instead.
IMAGES = {
    "2D 366x1x56x40": (366, 1, 56, 40),
    "3D 2x1x128^3": (2, 1, 128, 128, 128),
    "3D 2x1x40x56x40": (2, 1, 40, 56, 40),
}
QUICK_IMAGES = {"2D 5x1x9x8": (5, 1, 9, 8), "3D 2x1x6x7x5": (2, 1, 6, 7, 5)}
CLASSES, MANY_CLASSES = 3, 20
#: Where the many classes and the bars are.
LARGE = "3D 2x1x128^3"
ALPHA, EPS = 0.05, 0.12
NORMS: tuple[Norm, ...] = get_args(Norm)

#: Share of the copy bandwidth that a step is to reach on CUDA.
BAR = 0.8
#: Seconds that a measurement lasts at least.
LEAST_SECONDS = 0.02
#: Inputs and results of all sets together: several times what caches of GPUs hold.
ALL_SETS = 2**28
#: Elements that are compared at a time: in float64 the reference needs many times the memory.
COMPARED = 2**22

PLAIN, COPY = "plain", "copy_"


@dataclass(frozen=True)
class Op:
    """An op as it is measured.

    Attributes:
        name: in the tables.
        make: inputs for a shape (B, C, *S), on the CPU.
        ours: the public function.
        plain: the plain composition.
        exact: the specification, for inputs in float64.
        reads: passes over each input that it cannot do without.
        writes: the input that the result, which is written once, is as large as; none where it is a few numbers.
        tolerance: relative and absolute.
        random: the plain composition has a randomness of its own.
    """

    name: str
    make: Callable[[tuple[int, ...], torch.Generator], Tensors]
    ours: Callable[[Tensors], Results]
    plain: Callable[[Tensors], Results]
    exact: Callable[[Tensors], Results]
    reads: dict[str, int]
    writes: str | None
    tolerance: tuple[float, float] = (2e-5, 1e-6)
    random: bool = False

    def moved(self, inputs: Tensors) -> int:
        """Bytes that must be read and written."""
        written = inputs[self.writes].nbytes if self.writes else 0
        return written + sum(passes * inputs[name].nbytes for name, passes in self.reads.items())

    def footprint(self, inputs: Tensors) -> int:
        """Bytes of inputs and result, each once."""
        return sum(inputs[name].nbytes for name in [*self.reads, *([self.writes] if self.writes else [])])


def fits(ours: torch.Tensor, exact: torch.Tensor, tolerance: tuple[float, float]) -> None:
    """Raise AssertionError unless they are equal, integers exactly."""
    if not ours.is_floating_point():
        assert torch.equal(ours, exact), f"{int((ours != exact).sum())} of {ours.numel()} values differ"
    else:
        rtol, atol = tolerance
        torch.testing.assert_close(ours.double(), exact.double(), rtol=rtol, atol=atol)


# Images


def make_images(
    shape: tuple[int, ...], generator: torch.Generator, masked: bool = False, boxed: bool = False
) -> Tensors:
    """Perturbations inside the ball that a step takes out of it, in part."""
    batch = shape[0]
    inputs = {
        "delta": torch.randn(shape, generator=generator) * 0.1,
        "gradient": torch.randn(shape, generator=generator) * 1e-4,
        "alpha": torch.full((batch,), ALPHA),
        "eps": torch.full((batch,), EPS),
    }
    if masked:
        inputs["mask"] = torch.rand(shape, generator=generator) < 0.5
    if boxed:
        inputs["image"] = image = torch.randn(shape, generator=generator)
        # The plain composition's clamp would move a voxel that lies outside.
        inputs |= {"low": image.flatten(1).amin(1), "high": image.flatten(1).amax(1)}
    return inputs


def own_step(norm: Norm, inputs: Tensors) -> Results:
    box = (inputs["low"], inputs["high"]) if "low" in inputs else None
    return ops.gradient_step(
        inputs["delta"], inputs["gradient"], alpha=inputs["alpha"], eps=inputs["eps"], norm=norm,
        mask=inputs.get("mask"), image=inputs.get("image"), box=box,
    )  # fmt: skip


def exact_step(norm: Norm, inputs: Tensors) -> Results:
    rest = (inputs.get(name) for name in ("mask", "image", "low", "high"))
    return reference.gradient_step(inputs["delta"], inputs["gradient"], inputs["alpha"], inputs["eps"], norm, *rest)


def rms(image: torch.Tensor) -> torch.Tensor:
    """Broadcasts over ``image`` (B, C, *S)."""
    return ops.per_row(image.flatten(1).norm(dim=1) / math.sqrt(image[0].numel()), image)


def plain_step(norm: Norm, inputs: Tensors) -> Results:
    delta, gradient = inputs["delta"], inputs["gradient"]
    alpha, eps = (ops.per_row(inputs[name], delta) for name in ("alpha", "eps"))
    if "mask" in inputs:
        gradient = gradient * inputs["mask"]
    if norm == "l2":
        size = rms(gradient)
        delta = delta + alpha * (gradient / size.clamp_min(1e-12))
        delta = delta * (eps / rms(delta).clamp_min(1e-12)).clamp_max(1)
    else:
        size = gradient.flatten(1).abs().amax(1)
        delta = (delta + alpha * gradient.sign()).clamp(-eps, eps)
    if "image" in inputs:
        image, low, high = inputs["image"], *(ops.per_row(inputs[name], delta) for name in ("low", "high"))
        delta = (image + delta).clamp(low, high) - image
    return delta, size.flatten()


def step(norm: Norm, masked: bool = False, boxed: bool = False) -> Op:
    """A gradient step. An L-infinity step needs one pass: where it goes does not depend on the whole gradient."""
    passes = 2 if norm == "l2" else 1
    reads = {"delta": passes, "gradient": passes}
    reads |= {"mask": passes} if masked else {}
    reads |= {"image": 1} if boxed else {}
    return Op(
        "gradient_step " + norm + ", mask" * masked + ", box" * boxed,
        functools.partial(make_images, masked=masked, boxed=boxed),
        functools.partial(own_step, norm), functools.partial(plain_step, norm), functools.partial(exact_step, norm),
        reads, writes="delta",
    )  # fmt: skip


def make_start(shape: tuple[int, ...], generator: torch.Generator) -> Tensors:
    seeds = torch.randint(2**62, shape[:1], generator=generator)
    return {"like": torch.zeros(shape), "radius": torch.full(shape[:1], EPS), "seeds": seeds}


def plain_start(norm: Norm, inputs: Tensors) -> Results:
    like, radius = inputs["like"], ops.per_row(inputs["radius"], inputs["like"])
    if norm == "linf":
        return (torch.empty_like(like).uniform_(-1, 1) * radius,)
    noise = torch.randn_like(like)
    return (noise * (radius * torch.rand_like(radius) / rms(noise)),)


def start(norm: Norm) -> Op:
    """Noise: no pass but the one that writes it, since it can be made twice."""
    return Op(
        f"random_start {norm}", make_start,
        lambda i: (ops.random_start(i["like"], i["radius"], norm, i["seeds"]),), functools.partial(plain_start, norm),
        lambda i: (reference.random_start(i["like"], i["radius"], norm, i["seeds"], None),),
        {}, writes="like", tolerance=(1e-4, 1e-5), random=True,
    )  # fmt: skip


def make_ends(shape: tuple[int, ...], generator: torch.Generator) -> Tensors:
    ends = {name: torch.randn(shape, generator=generator) * 0.1 for name in ("inner", "outer")}
    return ends | {"share": torch.rand(shape[:1], generator=generator)}


def plain_interpolation(norm: Norm, inputs: Tensors) -> Results:
    inner, outer = inputs["inner"], inputs["outer"]
    point = inner + ops.per_row(inputs["share"], inner) * (outer - inner)
    return point, rms(point).flatten() if norm == "l2" else point.flatten(1).abs().amax(1)


def interpolation(norm: Norm) -> Op:
    """One pass."""
    return Op(
        f"interpolate {norm}", make_ends,
        lambda i: ops.interpolate(i["inner"], i["outer"], i["share"], norm),
        functools.partial(plain_interpolation, norm),
        lambda i: reference.interpolate(i["inner"], i["outer"], i["share"], norm),
        {"inner": 1, "outer": 1}, writes="inner",
    )  # fmt: skip


IMAGE_OPS = [
    *(step(norm, *with_) for with_ in ((), (True,), (False, True)) for norm in NORMS),
    *(start(norm) for norm in NORMS),
    *(interpolation(norm) for norm in NORMS),
]


# Logits


def make_logits(shape: tuple[int, ...], generator: torch.Generator) -> Tensors:
    """Labels, and logits that are mostly right. ``labels`` are for the plain compositions, ``reference`` for ours."""
    batch, classes, *space = shape
    labels = torch.randint(classes, (batch, *space), generator=generator)
    logits = torch.randn(shape, generator=generator)
    logits.scatter_add_(1, labels[:, None], torch.full((batch, 1, *space), 2.0))
    return {
        "logits": logits,
        "labels": labels,
        "reference": Target.from_raw(labels[:, None], Labels(classes)).reference,
    }


def target_of(inputs: Tensors) -> Target:
    return Target(inputs["reference"], None, Labels(inputs["logits"].shape[1]))


def slope(loss: Callable[[Tensors], torch.Tensor], inputs: Tensors) -> Results:
    """Loss, and its gradient times the number of voxels, which is then of a size that a tolerance makes sense for."""
    logits = inputs["logits"].detach().requires_grad_()
    with torch.enable_grad():
        value = loss({**inputs, "logits": logits})
        voxels = logits[0, 0].numel()
        (gradient,) = torch.autograd.grad(value, logits, torch.full_like(value, voxels))
    return value.detach(), gradient


def plain_dice_ce(inputs: Tensors) -> torch.Tensor:
    logits, labels = inputs["logits"], inputs["labels"]
    probabilities = logits.softmax(1).flatten(2)
    truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).flatten(2).to(logits.dtype)
    overlap, total = (probabilities * truth).sum(2), probabilities.sum(2) + truth.sum(2)
    dice = ((2 * overlap + ops.SMOOTH) / (total + ops.SMOOTH))[:, 1:].mean(1)
    return F.cross_entropy(logits, labels, reduction="none").flatten(1).mean(1) - dice


def exact_slope(inputs: Tensors) -> Results:
    arguments = inputs["logits"], inputs["reference"], None
    loss, sums, voxels = reference.dice_ce(*arguments)
    return loss, reference.dice_ce_backward(voxels, *arguments, sums, voxels)


def plain_counts(inputs: Tensors) -> Results:
    """Counts, and whether logits are finite, which an attack has to know as well."""
    logits, classes = inputs["logits"], inputs["logits"].shape[1]
    predicted, true = (
        F.one_hot(each.flatten(1), classes)[..., 1:].bool() for each in (logits.argmax(1), inputs["labels"])
    )
    counts = torch.stack([(predicted & true).sum(1), predicted.sum(1), true.sum(1)], -1)
    return counts, torch.isfinite(logits).flatten(1).all(1)


LOGITS_OPS = [
    Op(
        "dice_ce forward", make_logits,
        lambda i: (ops.dice_ce(i["logits"], target_of(i)),), lambda i: (plain_dice_ce(i),),
        lambda i: reference.dice_ce(i["logits"], i["reference"], None)[:1],
        {"logits": 1, "reference": 1}, writes=None,
    ),
    Op(
        "dice_ce forward + backward", make_logits,
        functools.partial(slope, lambda i: ops.dice_ce(i["logits"], target_of(i))),
        functools.partial(slope, plain_dice_ce), exact_slope,
        {"logits": 2, "reference": 2}, writes="logits",
    ),
    Op(
        "hard_counts", make_logits,
        lambda i: ops.hard_counts(i["logits"], target_of(i)), plain_counts,
        lambda i: reference.hard_counts(i["logits"], i["reference"], None),
        {"logits": 1, "reference": 1}, writes=None,
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """An op and what it runs on."""

    op: Op
    case: str
    shape: tuple[int, ...]
    device: torch.device

    def inputs(self) -> Tensors:
        """The same whenever they are made."""
        made = self.op.make(self.shape, torch.Generator().manual_seed(0))
        return {name: tensor.to(self.device) for name, tensor in made.items()}


def problems(quick: bool, device: torch.device) -> Iterator[Problem]:
    """Everything that is measured."""
    images = QUICK_IMAGES if quick else IMAGES
    for op in IMAGE_OPS:
        for case, shape in images.items():
            yield Problem(op, case, shape, device)
    large = list(images)[-1] if quick else LARGE
    for op in LOGITS_OPS:
        for case, (batch, _, *space) in images.items():
            for classes in (CLASSES, MANY_CLASSES) if case == large else (CLASSES,):
                yield Problem(op, f"{case}, {classes} classes", (batch, classes, *space), device)


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
            "gb_per_s": round(moved / statistics.median(seconds) / 1e9, 3), "copy_gb_per_s": round(bandwidth, 3),
            "share": share["ratio"], "share_min_max": share["ratio_min_max"],
        }  # fmt: skip
        rows.append(row)
    return rows


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is demanded of steps on CUDA, what was measured, and whether it is enough."""
    steps = {f"gradient_step {norm}" for norm in NORMS}
    judged = [r for r in rows if r["op"] in steps and r["case"] == LARGE and r["implementation"] == "triton"]
    missing = sorted(steps - {row["op"] for row in judged})
    found = [
        {
            "op": row["op"],
            "case": row["case"],
            "measured": row["share"],
            "bar": f">= {BAR}",
            "pass": row["share"] >= BAR,
        }
        for row in judged
    ]
    # Kernels that did not run have not passed.
    return found + [
        {"op": op, "case": LARGE, "measured": "no kernel ran", "bar": f">= {BAR}", "pass": False} for op in missing
    ]


def tables(result: dict[str, Any]) -> str:
    """Measurements and bars as Markdown."""
    device = any("device_us" in row for row in result["rows"])
    kinds = ["call", *["device"] * device]
    keys = ["op", "case", "implementation", *(f"{kind}_us" for kind in kinds), "to_reference", "bytes", "gb_per_s",
            "copy_gb_per_s", "share"]  # fmt: skip
    body = [[*(row[key] for key in keys), "-".join(map(str, row["share_min_max"]))] for row in result["rows"]]
    head = ["op", "case", "implementation", *(f"{kind}, us" for kind in kinds), "time / reference", "bytes", "GB/s",
            "copy GB/s", "share of copy", "min-max"]  # fmt: skip
    triton = f"triton {result['triton']}" if result["triton"] else "triton not installed"
    parts = [
        "# Fused ops",
        f"`{result['command']}`, {result['date']}. {result['device']} ({result['cpu']}). torch {result['torch']}, "
        f"{triton}.",
        f"Median of {result['rounds']} rounds, float32. Copy is `copy_` at the footprint of the op, read plus written. "
        f"`{PLAIN}` is a composition of torch's functions. Bytes are those that the op must move, whatever an "
        "implementation does move. `hard_counts` includes the check for finite logits. "
        + ("`call` is with Python's part, `device` without; ratios and shares are of `device`. " if device else "")
        + f"All results were compared with the reference in float64 first: {result['checked']} comparisons.",
        table(head, body),
    ]
    if result["bars"]:
        keys = ("op", "case", "measured", "bar")
        lines = [[*(bar[key] for key in keys), "pass" if bar["pass"] else "**fail**"] for bar in result["bars"]]
        parts += ["## Bars", "Share of the copy bandwidth.", table([*keys, ""], lines)]
    return "\n\n".join(parts) + "\n"


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
        write_text(RESULTS / f"ops_{device.type}.md", text)
        store("ops", device, result)


if __name__ == "__main__":
    main()
