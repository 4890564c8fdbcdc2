"""The settings of the methods that IMA is compared with."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ima_seg.methods.settings import TrainingSettings


class FixedBudgetSettings(TrainingSettings):
    """What all of these methods have: one budget for all cases.

    Attributes:
        eps: size of the perturbation, in ``unit``; the default is an L2 of 4.7 on a slice of 56x40.
    """

    sizes: ClassVar[tuple[str, ...]] = ("eps",)

    eps: float = 0.1


class NoiseSettings(FixedBudgetSettings):
    """Settings of :class:`ima_seg.methods.NoiseAugmentation`.

    Attributes:
        beta: share of the loss on noisy patches in the whole loss; the rest is on clean ones.
    """

    section: ClassVar[str] = "noise"

    beta: float = Field(1.0, gt=0, le=1)


class FGSMATSettings(FixedBudgetSettings):
    """Settings of :class:`ima_seg.methods.FGSMAT`.

    Attributes:
        step_factor: the step is ``step_factor * eps`` long.
        beta: share of the adversarial loss in the whole loss; the rest is clean.
    """

    section: ClassVar[str] = "fgsmat"

    step_factor: float = Field(1.25, gt=0)
    beta: float = Field(1.0, gt=0, le=1)


class PGDATSettings(FixedBudgetSettings):
    """Settings of :class:`ima_seg.methods.PGDAT`.

    Attributes:
        steps: gradient steps.
        step_factor: each is ``step_factor * eps / steps`` long.
        beta: share of the adversarial loss in the whole loss; the rest is clean.
    """

    section: ClassVar[str] = "pgdat"

    steps: int = Field(20, ge=1, le=1000)
    step_factor: float = Field(4.0, gt=0)
    beta: float = Field(1.0, gt=0, le=1)


class SegPGDATSettings(FixedBudgetSettings):
    """Settings of :class:`ima_seg.methods.SegPGDAT`.

    Attributes:
        steps: gradient steps.
        step_factor: each is ``step_factor * eps / steps`` long.
    """

    section: ClassVar[str] = "segpgdat"

    steps: int = Field(7, ge=1, le=1000)
    step_factor: float = Field(4.0, gt=0)


class FreeATSettings(FixedBudgetSettings):
    """Settings of :class:`ima_seg.methods.FreeAT`.

    Attributes:
        replays: updates m from each batch.
        step_factor: each moves the perturbation by ``step_factor * eps``.
    """

    section: ClassVar[str] = "freeat"

    replays: int = Field(4, ge=1, le=100)
    step_factor: float = Field(1.0, gt=0)


class TRADESSettings(FixedBudgetSettings):
    """Settings of :class:`ima_seg.methods.TRADES`.

    Attributes:
        steps: gradient steps.
        step_factor: each is ``step_factor * eps / steps`` long.
        weight: of the divergence (the paper's 1 / lambda).
    """

    section: ClassVar[str] = "trades"

    steps: int = Field(10, ge=1, le=1000)
    step_factor: float = Field(2.5, gt=0)
    weight: float = Field(6.0, ge=0)


class TemporalEnsemblingSettings(PGDATSettings):
    """Settings of :class:`ima_seg.methods.TemporalEnsembling`; ``beta`` is as for PGD training.

    Attributes:
        momentum: of the mean over past networks, per iteration.
        weight: of the distance to the mean network's prediction, at its highest.
        ramp: share of the training in which the weight rises to that.
    """

    section: ClassVar[str] = "te"

    momentum: float = Field(0.99, ge=0, lt=1)
    weight: float = Field(30.0, ge=0)
    ramp: float = Field(0.5, ge=0, le=1)
