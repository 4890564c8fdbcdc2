"""The boundary search of IMA training: the point of least Dice loss on the way out, found per sample.

A sample *crosses* when its quality, as a rule its hard foreground Dice, of a classifier the lead of the right answer,
falls below a threshold. The search walks outwards by PGD within each sample's own budget, keeps the last point that had
not crossed and the first that had, and closes that bracket by a root finder. Method: Ma & Liang, arXiv 2005.09147.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ima_seg.attacks.base import UNTARGETED, Loss, wrong
from ima_seg.attacks.losses import wrong_side
from ima_seg.attacks.network import Precision, frozen
from ima_seg.attacks.passes import Perturbed, all_finite, check_batch
from ima_seg.attacks.rows import HostCount, assign, positions
from ima_seg.attacks.sample_losses import class_logits, dice_ce_loss
from ima_seg.errors import UserError
from ima_seg.ops import (
    gradient_step,
    hard_counts,
    interpolate,
    mean_dice,
    per_row,
    perturbation_size,
    project,
)
from ima_seg.types import Network, PassCount, Target, ThreatModel

Refine = Literal["root", "bisection"]
#: (logits (B, K, *S) or (B, K), target) -> the quality (B,) float32, and whether all logits of a sample are finite,
#: (B,) bool.
Quality = Callable[[torch.Tensor, Target], tuple[torch.Tensor, torch.Tensor]]

#: Stands for a loss that is not finite.
HOPELESS = 1e4
#: The lead, in logits, of a wrong answer that is tied with the right one.
TIE = 1e-6


def dice_quality(logits: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Hard foreground Dice; NaN without foreground."""
    counts, sane = hard_counts(logits, target)
    return mean_dice(counts), sane


def loss_quality(logits: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Minus the sample's Dice + CE in excess of its least, which is 0 where all is right; (B,) float32, finite.

    The Dice of ``dice_ce_loss`` is the mean over all foreground classes, of which those that the
    reference lacks have none to gain.
    """
    gained = target.foreground.any(2).float().mean(1)
    return -(dice_ce_loss(logits, target) + gained).nan_to_num(HOPELESS, HOPELESS, HOPELESS), all_finite(logits)


def class_quality(logits: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much a classifier's answer is right: the true class's logit minus the best other; (B,) float32, finite.

    Multi-label: the least of z over the labels there are and -z over the others. Below 0 the answer is wrong. That it
    is continuous, other than right or wrong, is what finds the boundary in a few steps.
    """
    right = -wrong_side(class_logits(logits, target).float(), target).amax((1, 2))
    right = right.nan_to_num(-HOPELESS, HOPELESS, -HOPELESS)
    return torch.where(wrong(logits, target).any(1), right.clamp_max(-TIE), right), all_finite(logits)


def hard_quality(logits: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`dice_quality`, or of a classifier :func:`class_quality`."""
    return class_quality(logits, target) if target.whole_image else dice_quality(logits, target)


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
        if self.steps < 1 or self.refine_steps < 0 or self.multiple_of < 1:
            raise UserError(
                f"steps is {self.steps}, refine_steps {self.refine_steps}, multiple_of {self.multiple_of}; at least "
                "1, 0 and 1 are needed"
            )
        if self.refine not in get_args(Refine):
            raise UserError(f"refine is {self.refine!r}; there are: {', '.join(get_args(Refine))}")
        if self.step_factor <= 0 or self.start_slack < 0 or self.refine_tolerance < 0:
            raise UserError(
                f"step_factor is {self.step_factor}, start_slack {self.start_slack}, refine_tolerance "
                f"{self.refine_tolerance}; the first must be positive, the others not negative"
            )


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


@torch.no_grad()
def boundary_search(
    model: Network,
    x: torch.Tensor,
    target: Target,
    *,
    eps: torch.Tensor,
    threshold: torch.Tensor,
    clean_quality: torch.Tensor,
    settings: SearchSettings,
    threat: ThreatModel,
    searched: torch.Tensor | None = None,
    quality: Quality = hard_quality,
    loss: Loss = UNTARGETED.loss,
    support: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    precision: Precision = "auto",
    generator: torch.Generator | None = None,
) -> BoundaryResult:
    """Search each sample's decision boundary within its own budget.

    Args:
        model: network (B, C, *S) -> logits (or a list, full resolution first); its flags are restored.
        x: batch (B, C, *S) in network units.
        target: reference of the batch; every searched sample has foreground, or a class.
        eps: budget E of each sample, (B,), per voxel in network units.
        threshold: (B,), a sample has crossed when its quality is below; of a classifier 0.
        clean_quality: (B,) of the clean batch, at or above ``threshold``.
        settings: how to search.
        threat: norm and perturbable channels.
        searched: (B,) bool, the samples to search; the others are returned as they are. Default: all.
        quality: what falls below the threshold.
        loss: what the walk climbs.
        support: bool, broadcastable to the perturbable channels; the perturbation is zero outside.
        start: perturbation to start from, (B, image channels, *S); it is projected onto the ball of ``eps``. Default:
            a random one (see ``SearchSettings.start_slack``). Give a finite one for every searched sample.
        precision: of the passes, see :func:`ima_seg.attacks.network.resolve_precision`.
        generator: source of the random start; not used with ``start``.

    Crossed samples leave the working batch at once; the network only sees those still under way. How many these are is
    asked of the device once per step, on CUDA after the step's work has been queued.
    """
    check_batch(x, eps, target)
    for name, value, boolean in (
        ("threshold", threshold, False),
        ("clean_quality", clean_quality, False),
        ("searched", searched, True),
    ):
        if value is not None and (value.shape != eps.shape or boolean != (value.dtype == torch.bool)):
            kind = "bool" if boolean else "floating point"
            raise UserError(f"{name} is {value.dtype} of shape {tuple(value.shape)}; expected {kind} ({len(x)},)")
    batch = Perturbed(model, x, threat, precision, loss, support)
    if start is None:
        delta = batch.random(start_radius(eps, settings.start_slack), generator)
    else:
        wanted = tuple(threat.perturbable(x).shape)
        if tuple(start.shape) != wanted or not start.is_floating_point():
            raise UserError(
                f"start is {start.dtype} of shape {tuple(start.shape)}; expected floating point of the shape of the "
                f"perturbable channels, {wanted}"
            )
        delta = project(batch.zero() + batch.supported(start), eps, threat.norm)
    with frozen(model, batch.dtype):
        walk = _Walk(batch, target, delta, eps, threshold, clean_quality, searched, quality, settings)
        while walk.advance():
            pass
        outside, distance = _refine(walk, threshold)
    return BoundaryResult(
        adversarial=batch.apply(outside),
        crossed=walk.crossed,
        finite=walk.finite,
        distance=distance,
        stalled=walk.stalled & ~walk.crossed,
        passes=walk.passes,
    )


class _Walk:
    """The way outwards.

    What was found is kept for the full batch: ``point``, the last point or the first that had crossed; ``inner``, the
    one before it; ``quality`` and ``inner_quality`` of both. The working batch, ``rows`` of the full one, has tensors
    of its own, which are only copied when it shrinks.
    """

    def __init__(
        self,
        batch: Perturbed,
        target: Target,
        delta: torch.Tensor,
        eps: torch.Tensor,
        threshold: torch.Tensor,
        clean_quality: torch.Tensor,
        searched: torch.Tensor | None,
        quality_of: Quality,
        settings: SearchSettings,
    ) -> None:
        self.batch, self.target, self.quality_of, self.settings = batch, target, quality_of, settings
        self.point, self.inner = torch.zeros_like(delta), torch.zeros_like(delta)
        self.quality, self.inner_quality = clean_quality.float().clone(), clean_quality.float().clone()
        self.finite = torch.ones_like(eps, dtype=torch.bool)
        self.crossed, self.stalled = ~self.finite, ~self.finite
        self.passes, self._step = PassCount(), 0
        self._active = len(eps)

        self._rows = torch.arange(len(eps), device=eps.device)
        self._going = torch.ones_like(self.finite) if searched is None else searched
        self._working, self._reference = batch, target
        self._alpha, self._eps, self._threshold = settings.step_factor * eps / settings.steps, eps, threshold
        self._delta, self._before, self._quality_before = delta, self.inner, self.inner_quality
        if searched is not None:
            self._shrink(int(searched.sum()))

    def advance(self) -> bool:
        """Look where the working batch stands and take a step; False when there is none to take any more."""
        size, steps = len(self._rows), self.settings.steps
        if size == 0:
            return False
        final = self._step == steps
        if final:
            logits = self._working.logits(self._delta)
        else:
            here = self._working.at(self._delta, self._reference, self._step / steps)
            logits = here.logits
        quality, sane = self.quality_of(logits, self._reference)
        # Without a finite gradient in the step before, a sample has come to its end.
        going = sane & self.finite[self._rows]
        over = self._going & going & (quality < self._threshold)
        staying = self._going & going & ~over
        self._note(self.crossed, over)
        self._note(self.finite, self._going & ~sane, to=False)
        count = HostCount(staying)
        # On CUDA the host would wait here while the device has nothing to do.
        counted = self._delta.device.type == "cpu"
        if final or not counted or count.read() < self._active:
            # A point without finite logits says nothing; the one before it is the last.
            last = torch.where(per_row(sane, self._delta), self._delta, self._before)
            self._leave(self._going if final else self._going & ~staying, last, quality)
        if final or (counted and count.read() == 0):
            self.passes += PassCount(forwards=size)
            return False
        del logits
        gradient = here.gradient()
        del here
        self.passes += PassCount(gradients=size)
        stepped, length = gradient_step(
            self._delta, gradient, alpha=self._alpha, eps=self._eps, norm=self._working.threat.norm
        )
        del gradient
        self._note(self.stalled, staying & (length == 0) & ~self._working.scale.skipped)
        self._note(self.finite, staying & ~torch.isfinite(length), to=False)
        self._going, self._before, self._quality_before, self._delta = staying, self._delta, quality, stepped
        self._step += 1
        return self._shrink(count.read())

    def _shrink(self, count: int) -> bool:
        """Keep the ``count`` rows that go on, filled up; False when there are none."""
        self._active = count
        keep = positions(self._going, count, self.settings.multiple_of)
        if keep is not None:
            self._rows, self._going = self._rows[keep], self._going[keep]
            self._working, self._reference = self._working.select(keep), self._reference[keep]
            self._alpha, self._eps, self._threshold = self._alpha[keep], self._eps[keep], self._threshold[keep]
            self._delta, self._before, self._quality_before = (
                self._delta[keep], self._before[keep], self._quality_before[keep],
            )  # fmt: skip
        return count > 0

    def _leave(self, leaving: torch.Tensor, point: torch.Tensor, quality: torch.Tensor) -> None:
        """Note where the samples ``leaving`` the working batch have come to."""
        assign(self.point, self._rows, leaving, point)
        assign(self.inner, self._rows, leaving, self._before)
        assign(self.quality, self._rows, leaving, quality)
        assign(self.inner_quality, self._rows, leaving, self._quality_before)

    def _note(self, flags: torch.Tensor, where: torch.Tensor, to: bool = True) -> None:
        flags[self._rows] = (flags[self._rows] | where) if to else (flags[self._rows] & ~where)


def _refine(walk: _Walk, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Close the bracket [inner, point] of the crossed samples; returns its outer ends (B, ...) and their sizes (B,).

    The quality along a line is a function of one variable, the hard Dice one with steps. ``"root"`` is regula falsi
    with the Illinois weights
    (an end that stays twice has its value halved), kept half a tolerance away from both ends: once an end is close to
    the crossing, the next point lands just beyond it and the bracket closes from the other side.
    """
    settings, norm = walk.settings, walk.batch.threat.norm
    inner, outer, crossed = walk.inner, walk.point, walk.crossed
    low, high = torch.zeros_like(threshold), torch.ones_like(threshold)
    low_value, high_value = walk.inner_quality - threshold, walk.quality - threshold
    # How wide the bracket may be in units of its first width; the distance is that of its outer end.
    reach = settings.refine_tolerance / perturbation_size(outer - inner, norm).clamp_min(1e-30)
    wanted = reach * perturbation_size(outer, norm)
    alive = crossed & (high - low > wanted)
    rows = torch.arange(len(threshold), device=threshold.device)
    batch, target = walk.batch, walk.target
    for _ in range(settings.refine_steps):
        going = alive[rows]
        count = HostCount(going).read()
        if count == 0:
            break
        keep = positions(going, count, settings.multiple_of)
        if keep is not None:
            rows, going, inner, outer = rows[keep], going[keep], inner[keep], outer[keep]
            batch, target = batch.select(keep), target[keep]
        a, b, fa, fb, tolerance = low[rows], high[rows], low_value[rows], high_value[rows], wanted[rows]
        share = (a + b) / 2
        if settings.refine == "root":
            # fa >= 0 > fb by construction, so the denominator cannot vanish.
            nudge = torch.minimum(tolerance / 2, (b - a) / 2)
            share = torch.minimum(torch.maximum((a * fb - b * fa) / (fb - fa), a + nudge), b - nudge)
        delta, size = interpolate(inner, outer, share, norm)
        value = walk.quality_of(batch.logits(delta), target)[0] - threshold[rows]
        walk.passes += PassCount(forwards=len(rows))
        inside = value >= 0
        assign(low, rows, going & inside, share)
        assign(high, rows, going & ~inside, share)
        # Illinois: halve the value of the end that stays.
        assign(low_value, rows, going, torch.where(inside, value, fa / 2))
        assign(high_value, rows, going, torch.where(inside, fb / 2, value))
        assign(wanted, rows, going & ~inside, reach[rows] * size)
        alive[rows] = going & (high[rows] - low[rows] > wanted[rows])
    return interpolate(walk.inner, walk.point, torch.where(crossed, high, 1.0), norm)
