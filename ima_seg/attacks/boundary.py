"""The boundary search of IMA training: the point of least Dice loss on the way out, found per sample.

A sample *crosses* when its quality, as a rule its hard foreground Dice, of a classifier the lead of the right answer,
falls below a threshold. The search walks outwards by PGD within each sample's own budget, keeps the last point that had
not crossed and the first that had, and closes that bracket by a root finder. Method: Ma & Liang, arXiv 2005.09147.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ima_seg.attacks.passes import Passes
from ima_seg.attacks.problem import Problem, attack
from ima_seg.attacks.quality import Quality, hard_quality
from ima_seg.attacks.rows import HostCount, assign, positions
from ima_seg.errors import UserError
from ima_seg.ops import (
    check_images,
    check_per_sample,
    gradient_step,
    interpolate,
    per_row,
    perturbation_size,
    project,
)
from ima_seg.types import PassCount

Refine = Literal["root", "bisection"]


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    Args:
        steps: gradient steps K at most.
        step_factor: alpha; a step is ``alpha * eps / steps`` long.
        start_slack: the random start lies within ``min(eps, max(eps - start_slack, start_slack))``, per voxel in
            network units; IMA passes its expansion step here.
        refine: ``"root"`` (bracketed regula falsi) or ``"bisection"`` (the paper).
        refine_steps: forwards per crossed sample to place it on the boundary, at most.
        refine_tolerance: the bracket is closed when it is this share of the distance to the clean image.
            Bisection as in the paper makes all its steps: 0.
        multiple_of: the working batch holds a multiple of this many samples (or all), filled up with finished ones. A
            few fixed sizes keep CUDA's autotuning and torch.compile from starting over for each new batch size.
    """

    steps: int = 20
    step_factor: float = 4.0
    start_slack: float = 0.0
    refine: Refine = "root"
    refine_steps: int = 10
    refine_tolerance: float = 0.01
    multiple_of: int = 1

    def __post_init__(self) -> None:
        least = {"steps": 1, "multiple_of": 1, "refine_steps": 0, "start_slack": 0, "refine_tolerance": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"{name} is {getattr(self, name)}; at least {bound} is needed")
        if self.step_factor <= 0:
            raise UserError(f"step_factor is {self.step_factor}; it must be positive")
        if self.refine not in get_args(Refine):
            raise UserError(f"refine is {self.refine!r}; there are: {', '.join(get_args(Refine))}")


@dataclass(frozen=True)
class BoundaryResult:
    """What the search found, per sample of the batch.

    Attributes:
        adversarial: (B, C, *S). Crossed samples: the crossed end of the closed bracket, on the boundary within the
            tolerance. Others: the last point of the search. Samples without a finite gradient: their last finite point.
        crossed: (B,) bool.
        finite: (B,) bool, False where logits or gradient were NaN or infinite; such a sample says nothing.
        distance: (B,) size of the perturbation, per voxel in network units.
        stalled: (B,) bool, True where a gradient was exactly zero, so that the search stood still.
        passes: network passes.
    """

    adversarial: torch.Tensor
    crossed: torch.Tensor
    finite: torch.Tensor
    distance: torch.Tensor
    stalled: torch.Tensor
    passes: PassCount


def start_radius(eps: torch.Tensor, slack: float) -> torch.Tensor:
    """Largest size (B,) of a random start for budgets ``eps`` (B,), all per voxel in network units."""
    return torch.minimum(eps, (eps - slack).clamp_min(slack))


@attack
def boundary_search(
    problem: Problem,
    eps: torch.Tensor,
    *,
    threshold: torch.Tensor,
    clean_quality: torch.Tensor,
    settings: SearchSettings,
    searched: torch.Tensor | None = None,
    quality: Quality = hard_quality,
    start: torch.Tensor | None = None,
) -> BoundaryResult:
    """Search each sample's decision boundary within its own budget.

    Args:
        problem: what is attacked; every searched sample has foreground, or a class. The loss of its goal is climbed.
        eps: budget E of each sample (B,), or one number, per voxel in network units.
        threshold: (B,), a sample has crossed when its quality is below; of a classifier 0.
        clean_quality: (B,) of the clean batch, at or above ``threshold``.
        settings: how to search.
        searched: (B,) bool, the samples to search; the others are returned as they are. Default: all.
        quality: what falls below the threshold.
        start: perturbation to start from, (B, image channels, *S); it is projected onto the ball of ``eps``. Default:
            a random one (see ``SearchSettings.start_slack``). Give a finite one for every searched sample.

    Crossed samples leave the working batch at once; the network only sees those still under way. How many these are is
    asked of the device once per step, on CUDA after the step's work has been queued.
    """
    check_per_sample(problem.x, threshold=threshold, clean_quality=clean_quality)
    if searched is not None and (searched.shape != eps.shape or searched.dtype != torch.bool):
        raise UserError(f"searched is {searched.dtype} of shape {tuple(searched.shape)}; expected bool ({len(eps)},)")
    if start is None:
        delta = problem.random(start_radius(eps, settings.start_slack))
    else:
        check_images(**{"the perturbable channels": problem.image}, start=start)
        delta = project(problem.zero() + problem.supported(start), eps, problem.threat.norm)
    walk = _Walk(problem, delta, eps, threshold, clean_quality, searched, quality, settings)
    while walk.advance():
        pass
    outside, distance, passes = _refine(walk, threshold)
    stalled = walk.stalled & ~walk.crossed
    return BoundaryResult(problem.apply(outside), walk.crossed, walk.finite, distance, stalled, passes)


class _Walk:
    """The way outwards.

    What was found is kept for the full batch: ``point``, the last point or the first that had crossed; ``inner``, the
    one before it; ``quality`` and ``inner_quality`` of both. The working batch, ``rows`` of the full one, has tensors
    of its own, which are only copied when it shrinks.
    """

    def __init__(
        self,
        problem: Problem,
        delta: torch.Tensor,
        eps: torch.Tensor,
        threshold: torch.Tensor,
        clean_quality: torch.Tensor,
        searched: torch.Tensor | None,
        quality_of: Quality,
        settings: SearchSettings,
    ) -> None:
        self.problem, self.quality_of, self.settings = problem, quality_of, settings
        self.point, self.inner = torch.zeros_like(delta), torch.zeros_like(delta)
        self.quality, self.inner_quality = clean_quality.float().clone(), clean_quality.float().clone()
        self.finite = torch.ones_like(eps, dtype=torch.bool)
        self.crossed, self.stalled = ~self.finite, ~self.finite
        self.passes = Passes(problem)
        self._step, self._active = 0, len(eps)

        self._rows = torch.arange(len(eps), device=eps.device)
        self._going = torch.ones_like(self.finite) if searched is None else searched
        self._alpha, self._eps, self._threshold = settings.step_factor * eps / settings.steps, eps, threshold
        self._delta, self._before, self._quality_before = delta, self.inner, self.inner_quality
        if searched is not None:
            self._shrink(int(searched.sum()))

    def advance(self) -> bool:
        """Look where the working batch stands and take a step; False when there is none to take any more."""
        steps = self.settings.steps
        if len(self._rows) == 0:
            return False
        here = self.passes.at(self._delta, self._step / steps) if self._step < steps else None
        logits = self.passes.logits(self._delta) if here is None else here.logits
        quality, sane = self.quality_of(logits, self.passes.problem.target)
        # Without a finite gradient in the step before, a sample has come to its end.
        going = sane & self.finite[self._rows]
        over = self._going & going & (quality < self._threshold)
        staying = self._going & going & ~over
        assign(self.crossed, self._rows, over, over)
        assign(self.finite, self._rows, self._going & ~sane, sane)
        count = HostCount(staying)
        # On CUDA the host would wait here while the device has nothing to do.
        counted = self._delta.device.type == "cpu"
        if here is None or not counted or count.read() < self._active:
            # A point without finite logits says nothing; the one before it is the last.
            last = torch.where(per_row(sane, self._delta), self._delta, self._before)
            leaving = self._going if here is None else self._going & ~staying
            assign(self.point, self._rows, leaving, last)
            assign(self.inner, self._rows, leaving, self._before)
            assign(self.quality, self._rows, leaving, quality)
            assign(self.inner_quality, self._rows, leaving, self._quality_before)
        if here is None or (counted and count.read() == 0):
            return False
        del logits
        gradient = here.gradient()
        del here
        stepped, length = gradient_step(
            self._delta, gradient, alpha=self._alpha, eps=self._eps, norm=self.problem.threat.norm
        )
        del gradient
        finite, still = torch.isfinite(length), staying & (length == 0) & ~self.passes.scale.skipped
        assign(self.stalled, self._rows, still, still)
        assign(self.finite, self._rows, staying & ~finite, finite)
        self._going, self._before, self._quality_before, self._delta = staying, self._delta, quality, stepped
        self._step += 1
        return self._shrink(count.read())

    def _shrink(self, count: int) -> bool:
        """Keep the ``count`` rows that go on, filled up; False when there are none."""
        self._active = count
        if count == 0:
            self._rows = self._rows[:0]
            return False
        keep = positions(self._going, count, self.settings.multiple_of)
        if keep is not None:
            self.passes.select(keep)
            for name in ("rows", "going", "alpha", "eps", "threshold", "delta", "before", "quality_before"):
                setattr(self, f"_{name}", getattr(self, f"_{name}")[keep])
        return True


def _refine(walk: _Walk, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, PassCount]:
    """Close the bracket [inner, point] of the crossed samples.

    The quality along a line is a function of one variable, the hard Dice one with steps. ``"root"`` is regula falsi
    with the Illinois weights (an end that stays twice has its value halved), kept half a tolerance away from both ends:
    once an end is close to the crossing, the next point lands just beyond it and the bracket closes from the other
    side.

    Returns:
        Its outer ends (B, ...), their sizes (B,), and all passes of the search.
    """
    settings, norm = walk.settings, walk.problem.threat.norm
    inner, outer, crossed = walk.inner, walk.point, walk.crossed
    low, high = torch.zeros_like(threshold), torch.ones_like(threshold)
    low_value, high_value = walk.inner_quality - threshold, walk.quality - threshold
    # How wide the bracket may be in units of its first width; the distance is that of its outer end.
    reach = settings.refine_tolerance / perturbation_size(outer - inner, norm).clamp_min(1e-30)
    wanted = reach * perturbation_size(outer, norm)
    alive = crossed & (high - low > wanted)
    rows = torch.arange(len(threshold), device=threshold.device)
    passes = Passes(walk.problem)
    for _ in range(settings.refine_steps):
        going = alive[rows]
        count = HostCount(going).read()
        if count == 0:
            break
        keep = positions(going, count, settings.multiple_of)
        if keep is not None:
            passes.select(keep)
            rows, going, inner, outer = rows[keep], going[keep], inner[keep], outer[keep]
        a, b, fa, fb, tolerance = low[rows], high[rows], low_value[rows], high_value[rows], wanted[rows]
        share = (a + b) / 2
        if settings.refine == "root":
            # fa >= 0 > fb by construction, so the denominator cannot vanish.
            nudge = torch.minimum(tolerance / 2, (b - a) / 2)
            share = torch.minimum(torch.maximum((a * fb - b * fa) / (fb - fa), a + nudge), b - nudge)
        delta, size = interpolate(inner, outer, share, norm)
        value = walk.quality_of(passes.logits(delta), passes.problem.target)[0] - threshold[rows]
        inside = value >= 0
        assign(low, rows, going & inside, share)
        assign(high, rows, going & ~inside, share)
        # Illinois: halve the value of the end that stays.
        assign(low_value, rows, going, torch.where(inside, value, fa / 2))
        assign(high_value, rows, going, torch.where(inside, fb / 2, value))
        assign(wanted, rows, going & ~inside, reach[rows] * size)
        alive[rows] = going & (high[rows] - low[rows] > wanted[rows])
    outside, distance = interpolate(walk.inner, walk.point, torch.where(crossed, high, 1.0), norm)
    return outside, distance, walk.passes.made + passes.made
