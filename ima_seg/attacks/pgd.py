"""Fixed-budget gradient attacks with steps of one length: FGSM, I-FGSM, PGD."""

from __future__ import annotations

from typing import Literal

import torch

from ima_seg.attacks.passes import Passes
from ima_seg.attacks.problem import Eps, Problem, attack
from ima_seg.attacks.result import AttackResult, Best, finish
from ima_seg.errors import UserError
from ima_seg.ops import gradient_step

#: Which point is returned: that of most damage, or the last one, which costs neither its logits nor hard predictions.
Keep = Literal["best", "last"]


def fgsm(problem: Problem, eps: Eps) -> AttackResult:
    """The fast gradient method: one step from the clean batch to the boundary of the ball.

    Goodfellow, Shlens & Szegedy, "Explaining and harnessing adversarial examples", ICLR 2015, arXiv 1412.6572;
    l2: the gradient itself instead of its sign.
    """
    return pgd(problem, eps, steps=1, step_factor=1.0, start=False)


def ifgsm(problem: Problem, eps: Eps, *, steps: int, step_factor: float = 4.0, keep: Keep = "best") -> AttackResult:
    """Iterative FGSM, also basic iterative method: :func:`pgd` from the clean batch.

    Kurakin, Goodfellow & Bengio, "Adversarial examples in the physical world", ICLR workshop 2017, arXiv 1607.02533,
    whose number of steps amounts to a ``step_factor`` of 1.25 for large budgets.
    """
    return pgd(problem, eps, steps=steps, step_factor=step_factor, start=False, keep=keep)


@attack
def pgd(
    problem: Problem,
    eps: torch.Tensor,
    *,
    steps: int,
    restarts: int = 1,
    step_factor: float = 4.0,
    start: bool = True,
    keep: Keep = "best",
) -> AttackResult:
    """Projected gradient descent from random points of the ball; with one step, FGSM-RS.

    Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018, arXiv 1706.06083.

    Args:
        problem: what is attacked.
        eps: budget of each sample, (B,), or one number, per voxel in network units.
        steps: gradient steps of each restart.
        restarts: how often to start; the worst counts, per sample.
        step_factor: each step is ``step_factor * eps / steps`` long. No step is too long: what leaves the ball is
            projected back.
        start: whether to start at a random point; without, further restarts would repeat the first and are not made.
        keep: ``"last"`` returns the last point instead of that of most damage, without measuring any: ``damage`` is
            then NaN, the trace empty, and there is one restart.

    Returns:
        The point of most damage visited, the clean one included.
    """
    alpha, norm = step_factor * eps / steps, problem.threat.norm
    if keep == "last":
        if start and restarts > 1:
            raise UserError(f"restarts is {restarts}; with keep='last' nothing is measured that could choose from them")
        return _last(problem, eps, alpha, steps, start)
    best = Best(problem, eps, steps)
    if start:
        best.look(problem.zero(), 0)
    for _ in range(restarts if start else 1):
        delta = problem.random(eps) if start else problem.zero()
        for step in range(steps):
            here = best.passes.at(delta, step / steps)
            sane = best.visit(delta, here.logits, step)
            gradient = here.gradient()
            del here
            # An infinite logit can have a finite gradient; such a sample stays where it is.
            still = torch.where(sane, alpha, 0.0)
            delta, length = gradient_step(delta, gradient, alpha=still, eps=eps, norm=norm)
            best.count(length)
        best.look(delta, steps)
    return best.result()


def _last(problem: Problem, eps: torch.Tensor, alpha: torch.Tensor, steps: int, start: bool) -> AttackResult:
    """``steps`` steps and nothing else: the gradient passes are all that training pays for."""
    passes, zero = Passes(problem), torch.zeros(eps.shape, device=eps.device)
    delta = problem.random(eps) if start else problem.zero()
    for step in range(steps):
        gradient = passes.at(delta, step / steps).gradient()
        delta, length = gradient_step(delta, gradient, alpha=alpha, eps=eps, norm=problem.threat.norm)
        del gradient
        zero = zero + (length == 0)
    damage, trace = torch.full_like(zero, torch.nan), zero.new_empty((0, len(zero)))
    return finish(problem, delta, damage, zero / steps, trace, passes.made)
