"""The step that all methods share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ima_seg.methods.fixed_settings import FixedBudgetSettings
from ima_seg.types import Labels, PassCount, Target, ThreatModel

S = TypeVar("S", bound=FixedBudgetSettings)


def _backward(loss: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Calls:
    """How a training computes.

    Attributes:
        model: the network that is trained, also wrapped in DistributedDataParallel or torch.compile.
        loss: training loss of the network's whole output, for the batch of the step.
        forward: the network on a batch, under autocast where the training is.
        backward: backpropagates a loss, scaled where there is a gradient scaler.
        update: steps the optimiser and clears the gradients.
        generator: source of randomness.
    """

    model: nn.Module
    loss: Callable[[Any], torch.Tensor]
    forward: Callable[[nn.Module, torch.Tensor], Any]
    backward: Callable[[torch.Tensor], None]
    update: Callable[[], object]
    generator: torch.Generator | None

    def accumulate(self, terms: Iterable[tuple[torch.Tensor, float]]) -> torch.Tensor:
        """Accumulate the gradient of the weighted sum of the losses of some batches; returns the sum, 0-dim.

        One after the other, so that the memory is that of one. Of several ranks, gradients are exchanged in the last.
        """
        wanted = [(batch, weight) for batch, weight in terms if weight > 0]
        total = torch.zeros((), device=wanted[0][0].device)
        for index, (batch, weight) in enumerate(wanted):
            alone: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if isinstance(self.model, DistributedDataParallel) and index < len(wanted) - 1:
                alone = self.model.no_sync()
            with alone:
                value = self.loss(self.forward(self.model, batch)) * weight
                self.backward(value)
            total = total + value.detach()
        return total


@dataclass(frozen=True)
class MethodReport:
    """What a step did.

    Attributes:
        loss: that the gradient belongs to, 0-dim, detached; of several updates the mean.
        passes: of the network over samples that perturbations took.
        training: passes over samples with the gradient of the parameters.
    """

    loss: torch.Tensor
    passes: PassCount
    training: int


class Method(Generic[S]):
    """A way to train with perturbations of one size.

    Args:
        settings: of the method.
        labels: how the network's outputs are read.
        patch_voxels: image channels x voxels of a training patch.
        image_channels: the first this many input channels may be perturbed; None means all.
    """

    def __init__(self, settings: S, *, labels: Labels, patch_voxels: int, image_channels: int | None = None) -> None:
        self.settings, self.labels = settings, labels
        self.threat = ThreatModel(settings.norm, image_channels)
        #: Budget per voxel in network units.
        self.eps = settings.eps * settings.per_voxel(patch_voxels)
        #: Share of the training that is over, in [0, 1].
        self.progress = 0.0

    def step(
        self,
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        loss: Callable[[Any], torch.Tensor],
        update: Callable[[], object],
        backward: Callable[[torch.Tensor], None] = _backward,
        forward: Callable[[nn.Module, torch.Tensor], Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> MethodReport:
        """Accumulate the gradient of one step in ``p.grad``.

        Args:
            model: network (B, C, *S) -> logits (B, K, *S), or a list with the full resolution first; also wrapped in
                DistributedDataParallel or torch.compile.
            x: batch (B, C, *S), floating point, finite, in network units.
            y: reference at full resolution, (B, 1, *S) or (B, *S) labels, or regions (B, K[+1], *S).
            loss: training loss of the network's whole output, for this batch.
            update: steps the optimiser and clears the gradients; called between the updates of a method that makes
                several from a batch.
            backward: how to backpropagate a loss (a gradient scaler scales here).
            forward: how to call the network for the training passes (autocast goes here); default ``model(x)``.
            generator: source of randomness.

        The caller clears gradients before and makes the last update.
        """
        forward = forward or (lambda network, batch: network(batch))
        target = Target.from_raw(y, self.labels)
        return self._step(Calls(model, loss, forward, backward, update, generator), x.detach(), target)

    def _step(self, calls: Calls, x: torch.Tensor, target: Target) -> MethodReport:
        raise NotImplementedError

    @property
    def updates_per_batch(self) -> int:
        """How often a batch is used."""
        return 1

    def budget(self, x: torch.Tensor) -> torch.Tensor:
        """(B,) float32, the same for all samples."""
        return torch.full((len(x),), self.eps, device=x.device)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the network."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
