"""Auto-PGD: PGD with momentum whose step length follows from its progress, per sample."""

from __future__ import annotations

import math

import torch

from ima_seg.attacks.passes import all_finite
from ima_seg.attacks.problem import Problem, attack
from ima_seg.attacks.result import AttackResult, Best
from ima_seg.ops import gradient_step, per_row, perturbation_size, project

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


@attack
def apgd(
    problem: Problem, eps: torch.Tensor, *, steps: int, restarts: int = 1, start: bool = True, red_eps: bool = False
) -> AttackResult:
    """APGD, optionally with the progressively reduced radius of SEA.

    Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
    ICML 2020, arXiv 2003.01690, algorithm 1: from a step length of twice the radius, which is halved, and the walk
    taken back to the point of greatest loss, when the loss rose too seldom since the last checkpoint, or when neither
    step length nor greatest loss changed. Croce, Singh & Hein, "Towards reliable evaluation and fast training of robust
    semantic segmentation models", ECCV 2024, arXiv 2306.12941 (SEA): ``red_eps``.

    The loss alone drives step lengths and returns; what is handed out is the point of most damage within the budget.
    A loss that changes with the progress (SegPGD's) is compared between steps as it was at each.

    Arguments as for :func:`ima_seg.attacks.pgd`. ``red_eps``: stages of radius 2, 1.5 and 1 times ``eps``, 3 : 3 : 4 of
    the steps, each from the projection of the point of greatest loss of the one before. Points beyond the budget are
    climbed over, never returned.
    """
    best = Best(problem, eps, steps)
    stages = stage_lengths(steps, red_eps)
    if start or red_eps:  # else the clean batch is the first point of the walk, within the budget
        best.look(problem.zero(), 0)
    for _ in range(restarts if start else 1):
        done = 0
        delta = problem.random(eps * stages[0][0]) if start else problem.zero()
        for radius, length in stages:
            delta = _stage(best, delta, eps * radius, range(done, done + length), steps, radius == 1)
            done += length
    return best.result()


def _stage(
    best: Best, delta: torch.Tensor, radius: torch.Tensor, span: range, steps: int, within_budget: bool
) -> torch.Tensor:
    """APGD in balls of ``radius`` (B,) over the ``span`` of the ``steps``; returns the point of greatest loss.

    The damage of its points is noted in ``best`` only where the stage is ``within_budget``.
    """
    problem, passes = best.problem, best.passes
    norm, marks, since = problem.threat.norm, checkpoints(len(span)), 0
    alpha = 2 * radius
    previous = delta = project(delta.clone(), radius, norm)
    greatest = torch.full(radius.shape, -torch.inf, device=radius.device)
    top, top_gradient, last = delta, torch.zeros_like(delta), greatest
    # Since the last checkpoint: steps on which the loss rose, whether the step length was halved at it, greatest loss.
    rises, halved, greatest_then = torch.zeros_like(greatest), torch.zeros_like(greatest, dtype=torch.bool), greatest

    for step in range(len(span) + 1):
        done = span.start + step
        here = passes.at(delta, done / steps) if step < len(span) else None
        logits = passes.logits(delta) if here is None else here.logits
        sane = all_finite(logits)
        if within_budget:
            best.visit(delta, logits, done)
        if here is None:
            loss, gradient = problem.goal.loss(logits, problem.target, done / steps), torch.zeros_like(delta)
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
        if here is None:
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
