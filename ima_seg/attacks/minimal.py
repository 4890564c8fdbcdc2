"""The smallest perturbation that breaks a case, by boundary searches in ever smaller balls."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ima_seg.attacks.boundary import SearchSettings, boundary_search
from ima_seg.attacks.problem import Problem, attack
from ima_seg.attacks.result import AttackResult, Best, finish
from ima_seg.ops import per_row

#: After a crossing the next search looks within this share of its distance at most.
NEARER = 0.99


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


@attack
def minimal_norm(
    problem: Problem,
    eps: torch.Tensor,
    *,
    threshold: torch.Tensor,
    clean_quality: torch.Tensor,
    steps: int = 20,
    rounds: int = 12,
    restarts: int = 1,
) -> MinimalResult:
    """Bisect each sample's budget, with a boundary search from a new random start at every budget.

    The first search has the budget ``eps``. After a crossing at distance d and a failure within the ball of radius f
    (0 at first), the next looks within the smaller of (d + f) / 2 and 0.99 d. A failure proves nothing about a
    network that is not linear, so the search never stops below a crossing: the last rounds look again just below it.
    Samples that have not crossed are searched at ``eps`` in every round.

    A sample is broken when its quality is below ``threshold`` (B,): the hard foreground Dice, of a classifier
    :func:`ima_seg.attacks.class_quality`, whose threshold is 0. ``clean_quality`` (B,) is that of the clean batch, NaN
    without foreground. There are ``rounds`` searches of at most ``steps`` steps; ``restarts`` make all rounds again, go
    on from the smallest crossing and forget the failures.
    """
    best = Best(problem, eps, rounds * restarts)
    settings = SearchSettings(steps=steps, refine_steps=12, refine_tolerance=(1 - NEARER) / 2)
    foreground = ~torch.isnan(clean_quality)
    fallen = foreground & (clean_quality < threshold)
    searched = foreground & ~fallen
    crossing = torch.where(fallen, 0.0, torch.full_like(eps, torch.inf))
    failed, stalls = torch.zeros_like(eps), torch.zeros_like(eps)
    best.look(problem.zero(), 0)
    nearest, damage = best.delta, best.damage
    for search in range(rounds * restarts):
        if search % rounds == 0:
            failed = torch.zeros_like(eps)
        nearer = torch.minimum((crossing + failed) / 2, NEARER * crossing)
        budget = torch.where(torch.isinf(crossing), eps, nearer)
        found = boundary_search(
            problem, budget, threshold=threshold, clean_quality=clean_quality, settings=settings, searched=searched
        )
        best.passes.made += found.passes
        delta = problem.difference(found.adversarial)
        logits = best.look(delta, search + 1)
        better = searched & found.crossed & (found.distance < crossing)
        crossing = torch.where(better, found.distance, crossing)
        nearest = torch.where(per_row(better, delta), delta, nearest)
        damage = torch.where(better, problem.goal.damage(logits, problem.target).float(), damage)
        failed = torch.where(found.crossed, failed, torch.maximum(failed, budget))
        stalls = stalls + found.stalled
    broken = torch.isfinite(crossing)
    delta = torch.where(per_row(broken, nearest), nearest, best.delta)
    damage = torch.where(broken, damage, best.damage)
    result = finish(problem, delta, damage, stalls / (rounds * restarts), best.trace, best.passes.made)
    return MinimalResult(**vars(result), broken=broken, crossing=crossing, foreground=foreground)
