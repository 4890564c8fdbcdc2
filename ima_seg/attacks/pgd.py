"""Fixed-budget gradient attacks with steps of one length: FGSM, I-FGSM, PGD."""

from __future__ import annotations

from typing import Literal

import torch

from ima_seg.attacks.base import UNTARGETED, AttackResult, Goal
from ima_seg.attacks.network import Precision, frozen
from ima_seg.attacks.passes import Best, Perturbed, check_batch, check_counts, finish
from ima_seg.errors import UserError
from ima_seg.ops import gradient_step
from ima_seg.types import Network, PassCount, Target, ThreatModel

#: Which point is returned: that of most damage, or the last one, which costs neither its logits nor hard predictions.
Keep = Literal["best", "last"]


def fgsm(
    model: Network,
    x: torch.Tensor,
    target: Target,
    *,
    eps: torch.Tensor,
    threat: ThreatModel,
    steps: int = 1,
    restarts: int = 1,
    goal: Goal = UNTARGETED,
    support: torch.Tensor | None = None,
    precision: Precision = "auto",
    generator: torch.Generator | None = None,
) -> AttackResult:
    """The fast gradient method: one step from the clean batch to the boundary of the ball.

    Goodfellow, Shlens & Szegedy, "Explaining and harnessing adversarial examples", ICLR 2015, arXiv 1412.6572;
    l2: the gradient itself instead of its sign. Arguments as for :func:`pgd`. It makes one step and draws nothing:
    ``steps``, ``restarts`` and ``generator`` are there for the common signature and change nothing.
    """
    check_counts(steps, restarts)
    return _descend(
        model, x, target, eps=eps, threat=threat, steps=1, restarts=1, goal=goal, support=support,
        precision=precision, generator=None, step_factor=1.0, start=False, keep="best",
    )  # fmt: skip


def ifgsm(
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
    step_factor: float = 4.0,
    keep: Keep = "best",
) -> AttackResult:
    """Iterative FGSM, also basic iterative method: PGD from the clean batch.

    Kurakin, Goodfellow & Bengio, "Adversarial examples in the physical world", ICLR workshop 2017, arXiv 1607.02533,
    whose number of steps amounts to a ``step_factor`` of 1.25 for large budgets. Arguments as for :func:`pgd`.
    Every restart would repeat the first: ``restarts`` and ``generator`` change nothing.
    """
    check_counts(steps, restarts)
    return _descend(
        model, x, target, eps=eps, threat=threat, steps=steps, restarts=1, goal=goal, support=support,
        precision=precision, generator=None, step_factor=step_factor, start=False, keep=keep,
    )  # fmt: skip


def pgd(
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
    step_factor: float = 4.0,
    start: bool = True,
    keep: Keep = "best",
) -> AttackResult:
    """Projected gradient descent from random points of the ball; with one step, FGSM-RS.

    Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018, arXiv 1706.06083.

    Args:
        model: network (B, C, *S) -> logits (or a list, full resolution first); its flags are restored.
        x: batch (B, C, *S) in network units.
        target: reference of the batch.
        eps: budget of each sample, (B,), per voxel in network units; RMS over all voxels, whatever the support.
        threat: norm and perturbable channels.
        steps: gradient steps of each restart.
        restarts: how often to start; the worst counts, per sample.
        goal: what to climb and how to measure the damage.
        support: bool, broadcastable to the perturbable channels (B, image channels, *S); the perturbation is zero
            where it is False.
        precision: of the passes, see :func:`ima_seg.attacks.network.resolve_precision`.
        generator: source of the random starts.
        step_factor: each step is ``step_factor * eps / steps`` long. No step is too long: what leaves the ball is
            projected back.
        start: whether to start at a random point; without, further restarts would repeat the first and are not made.
        keep: ``"last"`` returns the last point instead of that of most damage, without measuring any: ``damage`` is
            then NaN, the trace empty, and there is one restart.

    Returns:
        The point of most damage visited, the clean one included.
    """
    check_counts(steps, restarts)
    return _descend(
        model, x, target, eps=eps, threat=threat, steps=steps, restarts=restarts if start else 1, goal=goal,
        support=support, precision=precision, generator=generator, step_factor=step_factor, start=start, keep=keep,
    )  # fmt: skip


@torch.no_grad()
def _descend(
    model: Network,
    x: torch.Tensor,
    target: Target,
    *,
    eps: torch.Tensor,
    threat: ThreatModel,
    steps: int,
    restarts: int,
    goal: Goal,
    support: torch.Tensor | None,
    precision: Precision,
    generator: torch.Generator | None,
    step_factor: float,
    start: bool,
    keep: Keep,
) -> AttackResult:
    """The loop of all three; arguments as for :func:`pgd`."""
    check_batch(x, eps, target)
    batch = Perturbed(model, x, threat, precision, goal.loss, support)
    alpha = step_factor * eps / steps
    if keep == "last":
        if restarts > 1:
            raise UserError(f"restarts is {restarts}; with keep='last' nothing is measured that could choose from them")
        return _last(batch, target, eps, alpha, steps, batch.random(eps, generator) if start else batch.zero())
    best = Best(batch, target, goal, eps, steps)
    forwards = 0
    with frozen(model, batch.dtype):
        if start:
            forwards += best.visit_clean()
        for _ in range(restarts):
            best.begin_restart()
            delta = batch.random(eps, generator) if start else batch.zero()
            for step in range(steps):
                here = batch.at(delta, target, step / steps)
                sane = best.visit(delta, here.logits, step)
                gradient = here.gradient()
                del here
                # An infinite logit can have a finite gradient; such a sample stays where it is.
                still = torch.where(sane, alpha, 0.0)
                delta, length = gradient_step(delta, gradient, alpha=still, eps=eps, norm=threat.norm)
                best.count(length)
            best.visit(delta, batch.logits(delta), steps)
            forwards += len(x)
    return best.result(forwards)


def _last(
    batch: Perturbed, target: Target, eps: torch.Tensor, alpha: torch.Tensor, steps: int, delta: torch.Tensor
) -> AttackResult:
    """``steps`` steps from ``delta`` and nothing else: the gradient passes are all that training pays for."""
    zero = torch.zeros(eps.shape, device=eps.device)
    with frozen(batch.model, batch.dtype):
        for step in range(steps):
            gradient = batch.at(delta, target, step / steps).gradient()
            delta, length = gradient_step(delta, gradient, alpha=alpha, eps=eps, norm=batch.threat.norm)
            del gradient
            zero = zero + (length == 0)
    return finish(
        batch,
        delta,
        damage=torch.full_like(zero, torch.nan),
        zero_gradient=zero / steps,
        trace=zero.new_empty((0, len(zero))),
        passes=PassCount(gradients=steps * len(zero)),
    )
