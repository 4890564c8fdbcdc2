"""Auto-PGD: PGD with momentum whose step length follows from its progress, per sample."""

from __future__ import annotations

import math

import torch

from ima_seg.attacks.base import UNTARGETED, AttackResult, Goal
from ima_seg.attacks.network import Precision, frozen
from ima_seg.attacks.passes import Best, Perturbed, all_finite, check_batch, check_counts
from ima_seg.ops import gradient_step, per_row, perturbation_size, project
from ima_seg.types import Network, Target, ThreatModel

#: Share of the new step in the sum with the momentum; the first step has no momentum.
MOMENTUM = 0.75
#: A step length stands if the loss rose in at least this share of the steps since the last checkpoint.
RISES = 0.75
#: red-eps of Croce, Singh & Hein 2024: (radius in units of eps, share of the steps), in order.
RED_EPS = ((2.0, 0.3), (1.5, 0.3), (1.0, 0.4))


def checkpoints(steps: int) -> list[int]:
    """Steps after which step lengths are reconsidered: ceil(p_j * steps) with p_1 = 0.22, then ever closer."""
    before, share, found = 0.0, 0.22, []
    while share <= 1:
        found.append(math.ceil(share * steps - 1e-9))  # 0.41 * 100 is a little more than 41
        before, share = share, share + max(share - before - 0.03, 0.06)
    return sorted(set(found))


def stage_lengths(steps: int, red_eps: bool) -> list[tuple[float, int]]:
    """(radius in units of eps, steps) of each stage; the last has at least one step, empty stages are left out."""
    if not red_eps:
        return [(1.0, steps)]
    lengths = [(radius, int(share * steps + 1e-9)) for radius, share in RED_EPS[:-1]]
    lengths.append((1.0, steps - sum(length for _, length in lengths)))
    return [(radius, length) for radius, length in lengths if length]


@torch.no_grad()
def apgd(
    model: Network,
    x: torch.Tensor,
    target: Target,
    *,
    eps: torch.Tensor,
    threat: ThreatModel,
    steps: int,
    restarts: int = 1,
    goal: Goal = UNTARGETED,
    support: torch.Tensor | None = None,
    precision: Precision = "auto",
    generator: torch.Generator | None = None,
    start: bool = True,
    red_eps: bool = False,
) -> AttackResult:
    """APGD, optionally with the progressively reduced radius of SEA.

    Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
    ICML 2020, arXiv 2003.01690, algorithm 1: from a step length of twice the radius, which is halved, and the walk
    taken back to the point of greatest loss, when the loss rose too seldom since the last checkpoint, or when neither
    step length nor greatest loss changed. Croce, Singh & Hein, "Towards reliable evaluation and fast training of robust
    semantic segmentation models", ECCV 2024, arXiv 2306.12941 (SEA): ``red_eps``.

    The loss alone drives step lengths and returns; what is handed out is the point of most damage within the budget.
    A loss that changes with the progress (SegPGD's) is compared between steps as it was at each.

    Args:
        model: network (B, C, *S) -> logits (or a list, full resolution first); its flags are restored.
        x: batch (B, C, *S) in network units.
        target: reference of the batch.
        eps: budget of each sample, (B,), per voxel in network units; RMS over all voxels, whatever the support.
        threat: norm and perturbable channels.
        steps: gradient steps of each restart, over all stages.
        restarts: how often to start; the worst counts, per sample.
        goal: what to climb and how to measure the damage.
        support: bool, broadcastable to the perturbable channels (B, image channels, *S); the perturbation is zero
            where it is False.
        precision: of the passes, see :func:`ima_seg.attacks.network.resolve_precision`.
        generator: source of the random starts.
        start: whether to start at a random point; without, further restarts would repeat the first and are not made.
        red_eps: stages of radius 2, 1.5 and 1 times ``eps`` with 3 : 3 : 4 of the steps, each from the projection of
            the point of greatest loss of the one before. Points beyond the budget are climbed over, never returned.

    Returns:
        The point of most damage visited, the clean one included.
    """
    check_batch(x, eps, target)
    check_counts(steps, restarts)
    batch = Perturbed(model, x, threat, precision, goal.loss, support)
    best = Best(batch, target, goal, eps, steps)
    stages = stage_lengths(steps, red_eps)
    forwards = 0
    with frozen(model, batch.dtype):
        if start or red_eps:  # else the clean batch is the first point of the walk, within the budget
            forwards += best.visit_clean()
        for _ in range(restarts if start else 1):
            best.begin_restart()
            done = 0
            delta = batch.random(eps * stages[0][0], generator) if start else batch.zero()
            for radius, length in stages:
                delta = _stage(batch, target, best, delta, eps * radius, length, done, steps, radius == 1)
                done += length
                forwards += len(x)
    return best.result(forwards)


def _stage(
    batch: Perturbed,
    target: Target,
    best: Best,
    delta: torch.Tensor,
    radius: torch.Tensor,
    length: int,
    done: int,
    steps: int,
    within_budget: bool,
) -> torch.Tensor:
    """APGD of ``length`` steps in balls of ``radius`` (B,) after ``done`` of ``steps``; the point of greatest loss.

    The damage of its points is noted in ``best`` only where the stage is ``within_budget``.
    """
    norm = batch.threat.norm
    alpha = 2 * radius
    delta = project(delta.clone(), radius, norm)
    previous = delta
    greatest = torch.full(radius.shape, -torch.inf, device=radius.device)
    top, top_gradient, last = delta, torch.zeros_like(delta), greatest
    # Since the last checkpoint: steps on which the loss rose, whether the step length was halved at it, greatest loss.
    rises, halved, greatest_then = torch.zeros_like(greatest), torch.zeros_like(greatest, dtype=torch.bool), greatest
    marks = checkpoints(length)
    since = 0

    for step in range(length + 1):
        final = step == length
        progress = (done + step) / steps
        here = None if final else batch.at(delta, target, progress)
        logits = batch.logits(delta) if here is None else here.logits
        sane = all_finite(logits)
        if within_budget:
            best.visit(delta, logits, done + step)
        else:
            best.carry(done + step)
        if here is None:
            loss, gradient = batch.loss(logits, target, progress), torch.zeros_like(delta)
        else:
            del logits
            loss, gradient = here.loss_and_gradient()
            best.count(perturbation_size(gradient, "linf"))
        # A point whose logits are not finite is neither the best nor one to go on from.
        sane = sane & torch.isfinite(loss)
        loss = torch.where(sane, loss, -torch.inf)
        greater = sane & (loss > greatest)
        greatest = torch.where(greater, loss, greatest)
        top = torch.where(per_row(greater, delta), delta, top)
        top_gradient = torch.where(per_row(greater, delta), gradient, top_gradient)
        if final:
            break
        if step > 0:
            rises = rises + (loss > last)
        if step == 0:
            greatest_then = greatest
        elif step in marks:
            stuck = (rises < RISES * (step - since)) | (~halved & (greatest <= greatest_then))
            alpha = torch.where(stuck, alpha / 2, alpha)
            back = per_row(stuck, delta)
            delta, gradient = torch.where(back, top, delta), torch.where(back, top_gradient, gradient)
            loss = torch.where(stuck, greatest, loss)
            sane = sane | stuck
            rises, halved, greatest_then, since = torch.zeros_like(rises), stuck, greatest, step
        last = loss

        moved, size = gradient_step(delta, gradient, alpha=alpha, eps=radius, norm=norm)
        if step > 0:
            moved = project(delta + MOMENTUM * (moved - delta) + (1 - MOMENTUM) * (delta - previous), radius, norm)
        usable = per_row(sane & torch.isfinite(size), delta)
        previous, delta = delta, torch.where(usable, moved, delta)
    return top
