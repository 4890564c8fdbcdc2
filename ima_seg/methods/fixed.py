"""Training on batches that are perturbed within one budget, by an attack or by noise."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from ima_seg.attacks import GOALS, UNTARGETED, Goal, Problem, pgd
from ima_seg.attacks.network import inner_module
from ima_seg.methods.base import Calls, Method, MethodReport
from ima_seg.methods.fixed_settings import (
    FGSMATSettings,
    FixedBudgetSettings,
    NoiseSettings,
    PGDATSettings,
    SegPGDATSettings,
)
from ima_seg.ops import per_row
from ima_seg.types import PassCount, Target

S = TypeVar("S", bound=FixedBudgetSettings)


def attacked(
    method: Method[S], calls: Calls, x: torch.Tensor, target: Target, steps: int, step_factor: float,
    goal: Goal = UNTARGETED,
) -> tuple[torch.Tensor, PassCount]:  # fmt: skip
    """The last point of PGD within the method's budget (B, C, *S), and the passes it took."""
    problem = Problem(
        inner_module(calls.model), x, target, method.threat, goal, precision=method.settings.precision,
        generator=calls.generator,
    )  # fmt: skip
    hit = pgd(problem, method.budget(x), steps=steps, step_factor=step_factor, keep="last")
    return hit.adversarial, hit.passes


def mixed(calls: Calls, x: torch.Tensor, perturbed: torch.Tensor, passes: PassCount, beta: float) -> MethodReport:
    """(1 - beta) loss(x) + beta loss(perturbed)."""
    loss = calls.accumulate([(x, 1 - beta), (perturbed, beta)])
    return MethodReport(loss, passes, len(x) * (2 if beta < 1 else 1))


class PGDAT(Method[PGDATSettings]):
    """Adversarial training with PGD of a fixed budget ("SAT").

    Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018, arXiv 1706.06083:
    the loss is L(x + d), d the last of K steps d <- P(d + alpha eps / K g / |g|) (sign(g) for linf) from a random point
    of the ball, g the gradient of the sample's own Dice + CE, P the projection onto the ball. With ``beta`` < 1:
    (1 - beta) L(x) + beta L(x + d).
    """

    def _step(self, calls: Calls, x: torch.Tensor, target: Target) -> MethodReport:
        perturbed, passes = attacked(self, calls, x, target, self.settings.steps, self.settings.step_factor)
        return mixed(calls, x, perturbed, passes, self.settings.beta)


class FGSMAT(Method[FGSMATSettings]):
    """Adversarial training with one step from a random point.

    Wong, Rice & Kolter, "Fast is better than free: revisiting adversarial training", ICLR 2020, arXiv 2001.03994:
    as :class:`PGDAT` with K = 1 and a step of 1.25 eps.
    """

    def _step(self, calls: Calls, x: torch.Tensor, target: Target) -> MethodReport:
        perturbed, passes = attacked(self, calls, x, target, 1, self.settings.step_factor)
        return mixed(calls, x, perturbed, passes, self.settings.beta)


class SegPGDAT(Method[SegPGDATSettings]):
    """Adversarial training with SegPGD, on batches half of which stay clean.

    Gu et al., "SegPGD: an effective and efficient adversarial attack for evaluating and boosting segmentation
    robustness", ECCV 2022, arXiv 2207.12391: the last half of the batch (of an odd one the larger) is perturbed by PGD
    on the SegPGD loss (:func:`ima_seg.attacks.losses.segpgd`); the loss is that of the batch.
    """

    def _step(self, calls: Calls, x: torch.Tensor, target: Target) -> MethodReport:
        rows = slice(len(x) // 2, None)
        perturbed, passes = attacked(
            self, calls, x[rows], target[rows], self.settings.steps, self.settings.step_factor, GOALS["segpgd"]
        )
        batch = torch.cat([x[: len(x) // 2], perturbed])
        return MethodReport(calls.accumulate([(batch, 1.0)]), passes, len(x))


class NoiseAugmentation(Method[NoiseSettings]):
    """Training on white noise: (1 - beta) L(x) + beta L(x + n).

    l2: n is Gaussian with a standard deviation drawn uniformly from [0, eps] for each patch; linf: uniform in [-r, r],
    r drawn likewise. The humble baseline; like Gaussian augmentation in Gilmer et al., "Adversarial examples are a
    natural consequence of test error in noise", ICML 2019, arXiv 1901.10513.
    """

    def _step(self, calls: Calls, x: torch.Tensor, target: Target) -> MethodReport:
        perturbed = x.clone()
        image = self.threat.perturbable(perturbed)
        draws: dict[str, Any] = {"device": x.device, "dtype": x.dtype, "generator": calls.generator}
        size = per_row(torch.rand(len(x), **draws) * self.eps, image)
        if self.settings.norm == "l2":
            image += size * torch.randn(image.shape, **draws)
        else:
            image += size * (2 * torch.rand(image.shape, **draws) - 1)
        return mixed(calls, x, perturbed, PassCount(), self.settings.beta)
