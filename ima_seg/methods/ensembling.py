"""Adversarial training with temporal ensembling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from typing_extensions import override

from ima_seg.attacks.network import frozen, full_resolution, inner_module
from ima_seg.methods.base import MethodReport
from ima_seg.methods.calls import EVERY, Calls
from ima_seg.methods.fixed import FixedBudget, PGDATSettings
from ima_seg.types import Classes, Labels, PassCount, Target


class TemporalEnsemblingSettings(PGDATSettings):
    """Settings of :class:`TemporalEnsembling`; ``beta`` is as for PGD training.

    Attributes:
        momentum: of the mean over past networks, per iteration.
        weight: of the distance to the mean network's prediction, at its highest.
        ramp: share of the training in which the weight rises to that.
    """

    section: ClassVar[str] = "te"

    momentum: float = Field(0.99, ge=0, lt=1)
    weight: float = Field(30.0, ge=0)
    ramp: float = Field(0.5, ge=0, le=1)


def probabilities(logits: torch.Tensor, labels: Labels | Classes) -> torch.Tensor:
    """(B, K, N) float32, N = 1 for a classifier: softmax over classes, sigmoid of regions."""
    flat = logits.float().reshape(*logits.shape[:2], -1)
    return flat.sigmoid() if labels.regions else flat.softmax(1)


class TemporalEnsembling(FixedBudget[TemporalEnsemblingSettings]):
    """PGD training whose predictions are held to the mean of earlier ones: L(x + d) + w |p(x + d) - m(x)|^2.

    Dong et al., "Exploring memorization in adversarial training", ICLR 2022, arXiv 2106.01606, after Laine & Aila,
    "Temporal ensembling for semi-supervised learning", ICLR 2017, arXiv 1610.02242. The squared distance is summed over
    classes and averaged over voxels; w rises as ``weight * exp(-5 (1 - t)^2)``, t from 0 to 1 over the first ``ramp``
    of the training.

    There m(x) is the mean of the sample's predictions in all epochs so far. Patches of nnU-Net are random augmented
    crops, of which none is met twice: m(x) is the prediction of the mean of the networks so far instead (Tarvainen &
    Valpola, "Mean teachers are better role models", NeurIPS 2017, arXiv 1703.01780), which is one forward more.
    """

    name, settings_class = "TE", TemporalEnsemblingSettings
    _mean: AveragedModel | None = None
    _state: Mapping[str, Any] | None = None

    @property
    def weight(self) -> float:
        """W at the present progress."""
        settings = self.settings
        t = min(self.progress / settings.ramp, 1.0) if settings.ramp > 0 else 1.0
        return settings.weight * math.exp(-5 * (1 - t) ** 2)

    def _step(self, calls: Calls, x: torch.Tensor, target: Target, case_ids: Sequence[str]) -> MethodReport:
        settings = self.settings
        mean = self._follow(inner_module(calls.model))
        with frozen(mean), torch.no_grad():
            expected = probabilities(full_resolution(calls.forward(mean.module, x)), self.labels)
        rows = calls.some(x, settings.share)
        perturbed, passes = self.attacked(calls, x[rows], target[rows], settings.steps, settings.step_factor)
        clean = calls.accumulate((x, EVERY, 1 - settings.beta)) if settings.beta < 1 else 0.0
        output = calls.forward(calls.model, perturbed)
        distance = (probabilities(full_resolution(output), self.labels) - expected[rows]).square().sum(1)
        valid = target[rows].valid
        if valid is None:
            held = distance.mean()
        else:
            counted = valid[:, 0]
            held = distance.masked_fill(~counted, 0.0).sum() / counted.sum().clamp_min(1)
        value = settings.beta * calls.loss(output, rows) + self.weight * held
        calls.backward(value)
        return MethodReport(
            loss=clean + value.detach(), passes=passes + PassCount(forwards=len(x)),
            training=len(perturbed) + (len(x) if settings.beta < 1 else 0), patches=len(x),
        )  # fmt: skip

    def _follow(self, network: Any) -> AveragedModel:
        """The mean network, moved towards ``network`` as it is now."""
        network = getattr(network, "_orig_mod", network)  # of a compiled one
        if self._mean is None:
            average = get_ema_multi_avg_fn(self.settings.momentum)  # type: ignore[no-untyped-call]
            self._mean = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
            if self._state is not None:
                self._mean.load_state_dict(dict(self._state))
        self._mean.update_parameters(network)
        return self._mean

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._mean is not None:
            return {"mean": self._mean.state_dict()}
        return {} if self._state is None else {"mean": dict(self._state)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mean, self._state = None, state.get("mean")
