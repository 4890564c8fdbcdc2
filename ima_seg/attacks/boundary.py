"""The boundary search of IMA training: the point of least Dice loss on the way out, found per sample.

A sample *crosses* when its hard foreground Dice falls below a threshold. The search walks outwards by PGD within each
sample's own budget, keeps the last point that had not crossed and the first that had, and closes that bracket by a
root finder. Method: Ma & Liang, arXiv 2005.09147.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ima_seg.attacks._gradient import Perturbed, check_batch
from ima_seg.attacks._rows import assign, remaining
from ima_seg.attacks.base import UNTARGETED, Loss
from ima_seg.errors import UserError
from ima_seg.model import Precision, frozen
from ima_seg.ops import gradient_step, hard_dice, per_row, perturbation_size, project, random_start
from ima_seg.types import Network, PassCount, Target, ThreatModel

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
    clean_dice: torch.Tensor,
    settings: SearchSettings,
    threat: ThreatModel,
    searched: torch.Tensor | None = None,
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
        target: reference of the batch; every searched sample has foreground.
        eps: budget E of each sample, (B,), per voxel in network units.
        threshold: (B,), a sample has crossed when its hard foreground Dice is below.
        clean_dice: (B,) hard foreground Dice of the clean batch, at or above ``threshold``.
        settings: how to search.
        threat: norm and perturbable channels.
        searched: (B,) bool, the samples to search; the others are returned as they are. Default: all.
        loss: what the walk climbs.
        support: bool, broadcastable to the perturbable channels; the perturbation is zero outside.
        start: perturbation to start from, (B, image channels, *S); it is projected onto the ball of ``eps``. Default:
            a random one (see ``SearchSettings.start_slack``). Give a finite one for every searched sample.
        precision: of the passes; ``"auto"`` is bfloat16 where native, see :func:`ima_seg.model.resolve_precision`.
        generator: source of the random start; not used with ``start``.

    Crossed samples leave the working batch at once; the network only sees those still under way.
    """
    check_batch(x, eps)
    norm, size = threat.norm, len(x)
    batch = Perturbed(model, x, threat, precision, loss, support)
    alpha = settings.step_factor * eps / settings.steps

    # All state is kept for the full batch; ``rows`` says which of it the network still works on.
    rows = torch.arange(size, device=x.device)
    finite = torch.ones(size, dtype=torch.bool, device=x.device)
    alive = finite.clone() if searched is None else searched.clone()
    crossed, stalled = ~finite, ~finite
    if start is None:
        radius = start_radius(eps, settings.start_slack)
        point = batch.supported(random_start(threat.perturbable(x), radius * alive, norm, generator))
    else:
        wanted = tuple(threat.perturbable(x).shape)
        if tuple(start.shape) != wanted:
            raise UserError(
                f"start has shape {tuple(start.shape)}; expected that of the perturbable channels, {wanted}"
            )
        point = torch.where(per_row(alive, start), batch.supported(start), 0.0)
        point = project(point, eps, norm)
    if searched is not None:
        rows = remaining(rows, alive, settings.multiple_of)
    inner, inner_dice, dice = torch.zeros_like(point), clean_dice.float().clone(), clean_dice.float().clone()
    passes = PassCount()

    with frozen(model):
        for step in range(settings.steps + 1):
            final = step == settings.steps
            whole = len(rows) == size
            here, reference = (batch, target) if whole else (batch.select(rows), target[rows])
            delta, going = point[rows], alive[rows]
            if final:
                logits = here.logits(delta)
                passes += PassCount(forwards=len(rows))
            else:
                leaf, logits = here.logits_with_graph(delta)
            scores = logits.detach()
            sane = torch.isfinite(scores.flatten(1).sum(1, dtype=torch.float32))
            dice_here = hard_dice(scores, reference)
            over = sane & (dice_here < threshold[rows])
            assign(dice, rows, going, dice_here)
            assign(crossed, rows, going, over)
            assign(finite, rows, going, sane)
            assign(point, rows, going & ~sane, inner[rows])
            alive[rows] = going & sane & ~over
            if final:
                break
            following = remaining(rows, alive, settings.multiple_of)
            if len(following) == 0:
                passes += PassCount(forwards=len(rows))
                break
            gradient = here.gradient(leaf, logits, reference, step / settings.steps)
            passes += PassCount(gradients=len(rows))
            del leaf, logits, scores
            length = perturbation_size(gradient, norm)
            usable, going = torch.isfinite(length), alive[rows]
            assign(finite, rows, going, usable)
            assign(stalled, rows, going, length == 0)
            alive[rows] = going & usable
            moving = going & usable
            stepped = gradient_step(delta, gradient, alpha=alpha[rows], eps=eps[rows], norm=norm)
            assign(inner, rows, moving, delta)
            assign(inner_dice, rows, moving, dice_here)
            assign(point, rows, moving, stepped)
            rows = following

        outside, forwards = _refine(batch, target, inner, point, inner_dice, dice, threshold, crossed, settings)
    return BoundaryResult(
        adversarial=batch.apply(outside),
        crossed=crossed,
        finite=finite,
        distance=perturbation_size(outside, norm),
        stalled=stalled & ~crossed,
        passes=passes + PassCount(forwards=forwards),
    )


def _refine(
    batch: Perturbed,
    target: Target,
    inner: torch.Tensor,
    outer: torch.Tensor,
    inner_dice: torch.Tensor,
    outer_dice: torch.Tensor,
    threshold: torch.Tensor,
    crossed: torch.Tensor,
    settings: SearchSettings,
) -> tuple[torch.Tensor, int]:
    """Close the bracket [inner, outer] of the crossed samples; returns the outer ends (B, ...) and the forwards made.

    The hard Dice along a line is a step function of one variable. ``"root"`` is regula falsi with the Illinois weights
    (an end that stays twice has its value halved), kept half a tolerance away from both ends: once an end is close to
    the crossing, the next point lands just beyond it and the bracket closes from the other side.
    """
    low = torch.zeros_like(threshold)
    high = torch.ones_like(threshold)
    low_value, high_value = inner_dice - threshold, outer_dice - threshold
    gap = perturbation_size(outer - inner, batch.threat.norm)
    # How wide the bracket may be in units of its first width; the distance is that of its outer end.
    wanted = settings.refine_tolerance * perturbation_size(outer, batch.threat.norm) / gap.clamp_min(1e-30)
    alive = crossed & (high - low > wanted)
    rows = torch.arange(len(threshold), device=threshold.device)
    forwards = 0
    for _ in range(settings.refine_steps):
        rows = remaining(rows, alive, settings.multiple_of)
        if len(rows) == 0:
            break
        a, b, fa, fb, tolerance = low[rows], high[rows], low_value[rows], high_value[rows], wanted[rows]
        middle = (a + b) / 2
        if settings.refine == "root":
            # fa >= 0 > fb by construction, so the denominator cannot vanish.
            nudge = torch.minimum(tolerance / 2, (b - a) / 2)
            share = torch.minimum(torch.maximum((a * fb - b * fa) / (fb - fa), a + nudge), b - nudge)
        else:
            share = middle
        shaped = share.view(-1, *(1,) * (inner.ndim - 1))
        delta = torch.lerp(inner[rows], outer[rows], shaped.to(inner.dtype))
        value = hard_dice(batch.select(rows).logits(delta), target[rows]) - threshold[rows]
        forwards += len(rows)
        inside = value >= 0
        going = alive[rows]
        assign(low, rows, going & inside, share)
        assign(high, rows, going & ~inside, share)
        # Illinois: halve the value of the end that stays.
        assign(low_value, rows, going, torch.where(inside, value, fa / 2))
        assign(high_value, rows, going, torch.where(inside, fb / 2, value))
        nearer = settings.refine_tolerance * perturbation_size(delta, batch.threat.norm) / gap[rows].clamp_min(1e-30)
        assign(wanted, rows, going & ~inside, nearer)
        alive[rows] = going & (high[rows] - low[rows] > wanted[rows])
    end = torch.lerp(inner, outer, high.view(-1, *(1,) * (inner.ndim - 1)).to(inner.dtype))
    return torch.where(crossed.view(-1, *(1,) * (inner.ndim - 1)), end, outer), forwards
