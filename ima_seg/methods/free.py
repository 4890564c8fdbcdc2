"""Adversarial training for the price of standard training."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import override

from ima_seg.methods.base import Calls, Method, MethodReport
from ima_seg.methods.fixed_settings import FreeATSettings
from ima_seg.ops import gradient_step
from ima_seg.types import Labels, PassCount, Target


class FreeAT(Method[FreeATSettings]):
    """Adversarial training "for free": each batch is used m times, and every backward pass serves both sides.

    Shafahi et al., "Adversarial training for free!", NeurIPS 2019, arXiv 1904.12843: m times in a row, the gradient of
    L(x + d) updates the parameters, and moves d by d <- P(d + alpha eps g / |g|) (sign(g) for linf). d is kept from
    batch to batch. L is the training loss itself, with all its heads. For the same cost as a standard training,
    iterations are to be divided by m.
    """

    def __init__(self, settings: FreeATSettings, *, labels: Labels, **options: Any) -> None:
        super().__init__(settings, labels=labels, **options)
        self._delta: torch.Tensor | None = None

    @property
    @override
    def updates_per_batch(self) -> int:
        return self.settings.replays

    def _step(self, calls: Calls, x: torch.Tensor, target: Target) -> MethodReport:
        image = self.threat.perturbable(x)
        delta = self._delta
        if delta is None or delta.shape != image.shape or delta.device != x.device:
            delta = torch.zeros_like(image, dtype=torch.float32)
        eps, replays = self.budget(x), self.settings.replays
        total = torch.zeros((), device=x.device)
        for replay in range(replays):
            if replay:
                calls.update()
            leaf = x.clone()
            self.threat.perturbable(leaf).add_(delta)
            leaf.requires_grad_(True)
            total = total + calls.accumulate([(leaf, 1.0)])
            assert leaf.grad is not None
            # The scale of a gradient scaler does not matter; where it has made the gradient infinite, d stays.
            delta, _ = gradient_step(
                delta, self.threat.perturbable(leaf.grad), alpha=self.settings.step_factor * eps, eps=eps,
                norm=self.settings.norm,
            )  # fmt: skip
        self._delta = delta
        return MethodReport(total / replays, PassCount(), len(x) * replays)
