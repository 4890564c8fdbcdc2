"""The smallest perturbation that breaks a case, by boundary searches in ever smaller balls."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ima_seg.attacks.base import UNTARGETED, AttackResult, Goal
from ima_seg.attacks.boundary import SearchSettings, boundary_search
from ima_seg.attacks.network import Precision, frozen
from ima_seg.attacks.passes import Best, Perturbed, check_batch, check_counts, finish
from ima_seg.ops import per_row
from ima_seg.types import Network, PassCount, Target, ThreatModel


@dataclass(frozen=True)
class MinimalResult(AttackResult):
    """What a search for the smallest perturbation found, per sample.

    ``adversarial``, ``distance`` and ``damage`` are those of the smallest crossing, and of samples not broken those of
    the point of most damage among the clean one and the last of each search. ``trace``: most damage up to each search,
    the clean point first. ``zero_gradient``: share of the searches that stood still at a gradient of exactly zero.

    Attributes:
        broken: (B,) bool, whether the hard foreground Dice fell below the threshold within the budget, or the
            answer of a classifier became wrong.
        crossing: (B,) float32, distance of the smallest crossing, per voxel in network units: an upper bound of the
            distance to the boundary. 0 where broken when clean, infinite where not broken.
        foreground: (B,) bool, False where the reference has no foreground; such a sample is never broken.
    """

    broken: torch.Tensor
    crossing: torch.Tensor
    foreground: torch.Tensor


@torch.no_grad()
def minimal_norm(
    model: Network,
    x: torch.Tensor,
    target: Target,
    *,
    eps: torch.Tensor,
    threshold: torch.Tensor,
    clean_dice: torch.Tensor,
    threat: ThreatModel,
    steps: int = 20,
    rounds: int = 12,
    restarts: int = 1,
    goal: Goal = UNTARGETED,
    support: torch.Tensor | None = None,
    precision: Precision = "auto",
    generator: torch.Generator | None = None,
    gamma: float = 0.01,
    step_factor: float = 4.0,
) -> MinimalResult:
    """Bisect each sample's budget, with a boundary search from a new random start at every budget.

    The first search has the budget ``eps``. After a crossing at distance d and a failure within the ball of radius f
    (0 at first), the next looks within the smaller of (d + f) / 2 and (1 - gamma) d. A failure proves nothing about a
    network that is not linear, so the search never stops below a crossing: the last rounds look again just below it.
    Samples that have not crossed are searched at ``eps`` in every round.

    Args:
        model: network (B, C, *S) -> logits; its flags are restored.
        x: batch (B, C, *S) in network units.
        target: reference of the batch.
        eps: the largest budget to look at, (B,), per voxel in network units.
        threshold: (B,), a sample is broken when its hard foreground Dice is below.
        clean_dice: (B,) hard foreground Dice of the clean batch, NaN without foreground; of a classifier
            :func:`ima_seg.attacks.boundary.class_quality` of the clean batch, with a ``threshold`` of 0.
        threat: norm and perturbable channels.
        steps: gradient steps of each search, at most.
        rounds: searches.
        restarts: how often to make all rounds; later ones go on from the smallest crossing and forget the failures.
        goal: the loss that the searches climb; the damage that is reported. ``threshold`` alone says what is broken.
        support: bool, broadcastable to the perturbable channels; the perturbation is zero outside.
        precision: of the passes, see :func:`ima_seg.attacks.network.resolve_precision`.
        generator: source of the random starts, on the device of ``x``.
        gamma: share of the distance by which the next crossing must at least be nearer.
        step_factor: a step is ``step_factor * budget / steps`` long.
    """
    check_batch(x, eps, target)
    check_counts(steps, restarts)
    check_counts(rounds, restarts)
    batch = Perturbed(model, x, threat, precision, goal.loss, support)
    best = Best(batch, target, goal, eps, rounds * restarts)
    settings = SearchSettings(steps=steps, step_factor=step_factor, refine_steps=12, refine_tolerance=gamma / 2)
    foreground = ~torch.isnan(clean_dice)
    fallen = foreground & (clean_dice < threshold)
    searched = foreground & ~fallen
    crossing = torch.where(fallen, 0.0, torch.full_like(eps, torch.inf))
    failed, stalls = torch.zeros_like(eps), torch.zeros_like(eps)
    with frozen(model, batch.dtype):
        forwards = best.visit_clean()
        nearest, damage = best.delta, best.damage
        passes = PassCount()
        for search in range(rounds * restarts):
            if search % rounds == 0:
                failed = torch.zeros_like(eps)
            nearer = torch.minimum((crossing + failed) / 2, (1 - gamma) * crossing)
            budget = torch.where(torch.isinf(crossing), eps, nearer)
            found = boundary_search(
                model, x, target, eps=budget, threshold=threshold, clean_quality=clean_dice, settings=settings,
                threat=threat, searched=searched, loss=goal.loss, support=support, precision=precision,
                generator=generator,
            )  # fmt: skip
            passes += found.passes
            delta = threat.perturbable(found.adversarial).to(best.delta.dtype) - threat.perturbable(x)
            logits = batch.logits(delta)
            forwards += len(x)
            best.visit(delta, logits, search + 1)
            better = searched & found.crossed & (found.distance < crossing)
            crossing = torch.where(better, found.distance, crossing)
            nearest = torch.where(per_row(better, delta), delta, nearest)
            damage = torch.where(better, goal.damage(logits, target).float(), damage)
            failed = torch.where(found.crossed, failed, torch.maximum(failed, budget))
            stalls = stalls + found.stalled
    broken = torch.isfinite(crossing)
    damage = torch.where(broken, damage, best.damage)
    result = finish(
        batch,
        torch.where(per_row(broken, nearest), nearest, best.delta),
        damage=torch.where(torch.isinf(damage), torch.nan, damage),
        zero_gradient=stalls / (rounds * restarts),
        trace=torch.where(torch.isinf(best.trace), torch.nan, best.trace),
        passes=passes + PassCount(forwards=forwards),
    )
    return MinimalResult(**vars(result), broken=broken, crossing=crossing, foreground=foreground)
