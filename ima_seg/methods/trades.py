"""Training on the trade-off between accuracy and robustness."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field

from ima_seg.attacks import Goal
from ima_seg.attacks.losses import divergence
from ima_seg.attacks.network import full_resolution
from ima_seg.attacks.passes import as_attacked
from ima_seg.methods.base import MethodReport
from ima_seg.methods.calls import EVERY, Calls, map_heads
from ima_seg.methods.fixed import FixedBudget, FixedBudgetSettings, Positive, Steps
from ima_seg.types import PassCount, Target


class TRADESSettings(FixedBudgetSettings):
    """Settings of :class:`TRADES`.

    Attributes:
        weight: of the divergence (the paper's 1 / lambda).
    """

    section: ClassVar[str] = "trades"

    steps: Steps = 10
    step_factor: Positive = 2.5
    weight: float = Field(6.0, ge=0)


class TRADES(FixedBudget[TRADESSettings]):
    """L(x) + weight KL(p(x) || p(x + d)): the clean loss, and how far a perturbation moves the prediction.

    Zhang et al., "Theoretically principled trade-off between robustness and accuracy", ICML 2019, arXiv 1901.08573.
    d is the last of K steps of PGD on the divergence, from a random point of the ball (theirs: a tiny Gaussian; at the
    clean image the divergence has no gradient). Predictions are those at full resolution. Clean and perturbed patches
    go through the network in one batch, clean ones first, whose graph both terms need: the memory is that of two
    batches.
    """

    name, settings_class = "TRADES", TRADESSettings

    def _step(self, calls: Calls, x: torch.Tensor, target: Target, case_ids: Sequence[str]) -> MethodReport:
        settings, count = self.settings, len(x)
        clean = as_attacked(calls.network, x, settings.precision)
        goal = Goal("divergence", partial(divergence, clean=clean))
        perturbed, passes = self.attacked(calls, x, target, settings.steps, settings.step_factor, goal)
        output = calls.forward(calls.model, torch.cat([x, perturbed]))
        heads = full_resolution(output)
        moved = divergence(heads[count:], target, clean=heads[:count]).mean()
        value = calls.loss(map_heads(output, lambda head: head[:count]), EVERY) + settings.weight * moved
        calls.backward(value)
        passes += PassCount(forwards=count)
        return MethodReport(loss=value.detach(), passes=passes, training=2 * count, patches=count)
