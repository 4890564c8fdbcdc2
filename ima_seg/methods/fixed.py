"""Training on batches that are perturbed within one budget for all cases, by an attack or by noise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from pydantic import Field, model_validator
from typing_extensions import override

from ima_seg.attacks import GOALS, UNTARGETED, Goal, pgd
from ima_seg.methods.base import Method, MethodReport
from ima_seg.methods.calls import EVERY, Calls
from ima_seg.methods.settings import TrainingSettings
from ima_seg.ops import gradient_step, per_row
from ima_seg.types import PassCount, Target

Steps = Annotated[int, Field(ge=1, le=1000)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class FixedBudgetSettings(TrainingSettings):
    """What these methods have in common: one budget for all cases.

    Attributes:
        eps: size of the perturbation, in ``unit``; the default is an L2 of 4.7 on a slice of 56x40.

    Where a method has them: ``steps`` gradient steps, each ``step_factor * eps / steps`` long; ``beta``, the share of
    the loss on perturbed samples in the whole loss, of which the rest is clean; ``share``, how many of a batch's
    samples are perturbed.
    """

    sizes: ClassVar[tuple[str, ...]] = ("eps",)

    eps: float = 0.1


F = TypeVar("F", bound=FixedBudgetSettings)


class FixedBudget(Method[F, MethodReport]):
    """A way to train with perturbations of one size."""

    @property
    def eps(self) -> float:
        """Budget per voxel in SDs."""
        return self.settings.eps * self.per_voxel

    @override
    def sizes(self) -> dict[str, float]:
        return {"eps": self.eps}

    def budget(self, x: torch.Tensor) -> torch.Tensor:
        """(B,) float32, the same for all samples."""
        return torch.full((len(x),), self.eps, device=x.device)

    def attacked(
        self, calls: Calls, x: torch.Tensor, target: Target, steps: int, step_factor: float, goal: Goal = UNTARGETED
    ) -> tuple[torch.Tensor, PassCount]:
        """The last point of PGD within the budget (B, C, *S), and the passes it took."""
        problem = self.problem(calls, x, target, goal)
        hit = pgd(problem, self.budget(x), steps=steps, step_factor=step_factor, keep="last")
        return hit.adversarial, hit.passes


class MixedSettings(FixedBudgetSettings):
    """What the settings of methods have in common that mix a clean and a perturbed loss."""

    beta: Share = 1.0
    share: Share = 1.0

    @model_validator(mode="after")
    def _all_are_trained_on(self) -> MixedSettings:
        if self.share < 1 and self.beta == 1:
            raise ValueError(
                f"share is {self.share:g} and beta 1, so that the samples which are not perturbed would not be trained "
                "on at all; set beta below 1 as well"
            )
        return self


M = TypeVar("M", bound=MixedSettings)


class Mixed(FixedBudget[M]):
    """(1 - beta) L(x) + beta L(x'), x' a share of the batch, perturbed."""

    def _step(self, calls: Calls, x: torch.Tensor, target: Target, case_ids: Sequence[str]) -> MethodReport:
        beta, rows = self.settings.beta, calls.some(x, self.settings.share)
        perturbed, passes = self.perturbed(calls, x[rows], target[rows])
        loss = calls.accumulate((x, EVERY, 1 - beta), (perturbed, rows, beta))
        training = len(perturbed) + (len(x) if beta < 1 else 0)
        return MethodReport(loss=loss, passes=passes, training=training, patches=len(x))

    @abstractmethod
    def perturbed(self, calls: Calls, x: torch.Tensor, target: Target) -> tuple[torch.Tensor, PassCount]:
        """Samples (n, C, *S) perturbed, and the passes it took."""


class PGDATSettings(MixedSettings):
    """Settings of :class:`PGDAT`."""

    section: ClassVar[str] = "pgdat"

    steps: Steps = 20
    step_factor: Positive = 4.0


class PGDAT(Mixed[PGDATSettings]):
    """Adversarial training with PGD of a fixed budget ("SAT").

    Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018, arXiv 1706.06083:
    the loss is L(x + d), d the last of K steps d <- P(d + alpha eps / K g / |g|) (sign(g) for linf) from a random point
    of the ball, g the gradient of the sample's own loss (Dice + CE, of a classifier CE), P the projection onto the
    ball. With ``beta`` < 1: (1 - beta) L(x) + beta L(x + d).
    """

    name, settings_class = "PGDAT", PGDATSettings

    @override
    def perturbed(self, calls: Calls, x: torch.Tensor, target: Target) -> tuple[torch.Tensor, PassCount]:
        return self.attacked(calls, x, target, self.settings.steps, self.settings.step_factor)


class FGSMATSettings(MixedSettings):
    """Settings of :class:`FGSMAT`."""

    section: ClassVar[str] = "fgsmat"

    step_factor: Positive = 1.25


class FGSMAT(Mixed[FGSMATSettings]):
    """Adversarial training with one step from a random point.

    Wong, Rice & Kolter, "Fast is better than free: revisiting adversarial training", ICLR 2020, arXiv 2001.03994:
    as :class:`PGDAT` with K = 1 and a step of 1.25 eps.
    """

    name, settings_class = "FGSMAT", FGSMATSettings

    @override
    def perturbed(self, calls: Calls, x: torch.Tensor, target: Target) -> tuple[torch.Tensor, PassCount]:
        return self.attacked(calls, x, target, 1, self.settings.step_factor)


class SegPGDATSettings(FixedBudgetSettings):
    """Settings of :class:`SegPGDAT`."""

    section: ClassVar[str] = "segpgdat"

    steps: Steps = 7
    step_factor: Positive = 4.0


class SegPGDAT(FixedBudget[SegPGDATSettings]):
    """Adversarial training with SegPGD, on batches half of which stay clean. For segmentations.

    Gu et al., "SegPGD: an effective and efficient adversarial attack for evaluating and boosting segmentation
    robustness", ECCV 2022, arXiv 2207.12391: the last half of the batch (of an odd one the larger) is perturbed by PGD
    on the SegPGD loss (:func:`ima_seg.attacks.losses.segpgd`); the loss is that of the batch.
    """

    name, settings_class, classifies = "SegPGDAT", SegPGDATSettings, False

    def _step(self, calls: Calls, x: torch.Tensor, target: Target, case_ids: Sequence[str]) -> MethodReport:
        rows = slice(len(x) // 2, None)
        perturbed, passes = self.attacked(
            calls, x[rows], target[rows], self.settings.steps, self.settings.step_factor, GOALS["segpgd"]
        )
        loss = calls.accumulate((torch.cat([x[: len(x) // 2], perturbed]), EVERY, 1.0))
        return MethodReport(loss=loss, passes=passes, training=len(x), patches=len(x))


class FreeATSettings(FixedBudgetSettings):
    """Settings of :class:`FreeAT`.

    Attributes:
        replays: updates m from each batch.
        step_factor: each moves the perturbation by ``step_factor * eps``.
    """

    section: ClassVar[str] = "freeat"

    replays: int = Field(4, ge=1, le=100)
    step_factor: Positive = 1.0


class FreeAT(FixedBudget[FreeATSettings]):
    """Adversarial training "for free": each batch is used m times, and every backward pass serves both sides.

    Shafahi et al., "Adversarial training for free!", NeurIPS 2019, arXiv 1904.12843: m times in a row, the gradient of
    L(x + d) updates the parameters, and moves d by d <- P(d + alpha eps g / |g|) (sign(g) for linf). d is kept from
    batch to batch. L is the training loss itself, with all its heads. For the same cost as a standard training,
    iterations are to be divided by m.
    """

    name, settings_class = "FreeAT", FreeATSettings
    _delta: torch.Tensor | None = None

    @property
    @override
    def updates_per_batch(self) -> int:
        return self.settings.replays

    def _step(self, calls: Calls, x: torch.Tensor, target: Target, case_ids: Sequence[str]) -> MethodReport:
        image = self.threat.perturbable(x)
        delta = self._delta
        if delta is None or delta.shape != image.shape or delta.device != x.device:
            delta = torch.zeros_like(image, dtype=torch.float32)
        eps, replays, problem = self.budget(x), self.settings.replays, self.problem(calls, x, target)
        delta = problem.supported(delta)
        total = torch.zeros((), device=x.device)
        for replay in range(replays):
            if replay:
                calls.update()
            leaf = problem.apply(delta).requires_grad_(True)
            total = total + calls.accumulate((leaf, EVERY, 1.0))
            assert leaf.grad is not None
            gradient = problem.through(self.threat.perturbable(leaf.grad), delta)
            # The scale of a gradient scaler does not matter; where it has made the gradient infinite, d stays.
            delta, _ = gradient_step(
                delta, gradient, alpha=self.settings.step_factor * eps, eps=eps, norm=self.settings.norm
            )
        self._delta = delta
        return MethodReport(loss=total / replays, passes=PassCount(), training=len(x) * replays, patches=len(x))


class NoiseSettings(MixedSettings):
    """Settings of :class:`NoiseAugmentation`."""

    section: ClassVar[str] = "noise"


class NoiseAugmentation(Mixed[NoiseSettings]):
    """Training on white noise: (1 - beta) L(x) + beta L(x + n).

    l2: n is Gaussian with a standard deviation drawn uniformly from [0, eps] for each patch; linf: uniform in [-r, r],
    r drawn likewise. The humble baseline; like Gaussian augmentation in Gilmer et al., "Adversarial examples are a
    natural consequence of test error in noise", ICML 2019, arXiv 1901.10513.
    """

    name, settings_class = "Noise", NoiseSettings

    @override
    def perturbed(self, calls: Calls, x: torch.Tensor, target: Target) -> tuple[torch.Tensor, PassCount]:
        problem = self.problem(calls, x, target)
        image = problem.image
        draws: dict[str, Any] = {"device": x.device, "dtype": x.dtype, "generator": calls.generator}
        size = per_row(torch.rand(len(x), **draws) * self.eps, image)
        if self.settings.norm == "l2":
            noise = size * torch.randn(image.shape, **draws)
        else:
            noise = size * (2 * torch.rand(image.shape, **draws) - 1)
        return problem.apply(problem.supported(noise)), PassCount()
