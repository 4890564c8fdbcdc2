"""The ops that ``ops.py`` times: their inputs, plain compositions, the bytes that they must move, and on what sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

import torch

from benchmarks.shared.baselines import (
    Results,
    Tensors,
    plain_counts,
    plain_dice_ce,
    plain_interpolation,
    plain_start,
    plain_step,
)
from ima_seg import Labels, Target, ops
from ima_seg.ops import reference
from ima_seg.types import Norm

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
#: What the plain composition is called among the implementations.
PLAIN = "plain"


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


def exact_slope(inputs: Tensors) -> Results:
    arguments = inputs["logits"], inputs["reference"], None
    loss, sums, voxels = reference.dice_ce(*arguments)
    return loss, reference.dice_ce_backward(voxels, *arguments, sums, voxels)


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
