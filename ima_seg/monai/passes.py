"""The network passes of a training step in MONAI's engine, with its events, autocast and gradient scaler."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from monai.engines.utils import IterationEvents
from monai.losses import DeepSupervisionLoss
from monai.utils.enums import CommonKeys as Keys
from torch import nn

from ima_seg.attacks.network import full_resolution
from ima_seg.errors import UserError
from ima_seg.methods.calls import Rows, map_heads
from ima_seg.monai.network import own_inputs


@dataclass
class Passes:
    """The training passes of an iteration, the first of them with MONAI's events."""

    engine: Any
    targets: torch.Tensor  # what the loss compares with
    args: tuple[Any, ...]  # further inputs of the network
    kwargs: Mapping[str, Any]
    size: int  # samples of the batch; a pass of more has them in its first rows
    share: int  # the gradient is divided by this
    _first: bool = True
    _stacked: bool = False

    @property
    def scaler(self) -> Any:
        """The gradient scaler; None without AMP."""
        return self.engine.scaler if self.engine.amp else None

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        amp = self.scaler is not None
        return torch.autocast("cuda", **self.engine.amp_kwargs) if amp else contextlib.nullcontext()

    def forward(self, network: nn.Module, batch: torch.Tensor) -> Any:
        """The output of ``network``, as a rule the one that is trained, for (N, C[+1], *S), stacked heads as a list."""
        images, args, kwargs = own_inputs(batch, self.args, self.kwargs, self.size)
        with self._autocast():
            prediction = self.engine.inferer(images, network, *args, **kwargs)
            if self._first and network is self.engine.network:
                output = self.engine.state.output
                more = len(images) > self.size
                shown = output[Keys.PRED] = map_heads(prediction, lambda h: h[: self.size]) if more else prediction
                self.engine.fire_event(IterationEvents.FORWARD_COMPLETED)
                if output[Keys.PRED] is not shown:
                    rest = map_heads(prediction, lambda head: head[self.size :])
                    prediction = _joined(output[Keys.PRED], rest) if more else output[Keys.PRED]
        # What a handler has put in its place counts.
        self._stacked = isinstance(prediction, torch.Tensor) and prediction.ndim == images.ndim + 1
        return list(prediction.unbind(1)) if self._stacked else prediction

    def loss(self, heads: Any, rows: Rows) -> torch.Tensor:
        """The training loss of what :meth:`forward` returned for these rows of the batch."""
        function = self.engine.loss_function
        stacked = self._stacked and not isinstance(function, DeepSupervisionLoss)
        with self._autocast():
            value = self._scalar(function(torch.stack(heads, 1) if stacked else heads, self.targets[rows]))
            if not self._first:
                return value
            self._first = False
            output = self.engine.state.output
            output[Keys.LOSS] = value
            self.engine.fire_event(IterationEvents.LOSS_COMPLETED)
            used: torch.Tensor = output[Keys.LOSS]
        # Without graph: the activations of this pass must be gone when the search begins.
        output[Keys.PRED], output[Keys.LOSS] = full_resolution(heads).detach(), used.detach()
        return used

    def _scalar(self, value: Any) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            raise UserError(
                f"loss_function returned a {type(value).__name__}; return one scalar tensor, the total that is to be "
                "backpropagated"
            )
        if value.numel() > 1 and not self.engine.loss_is_reduced:
            self.engine.loss_is_reduced = True
            self.engine.logger.warning(
                "loss_function returned a tensor of shape %s, not a scalar; its mean is trained on, as by "
                "SupervisedTrainer. Make the loss with reduction='mean' to say so. (The search needs no loss per "
                "sample from you: it climbs its own.)",
                tuple(value.shape),
            )
        scalar: torch.Tensor = value.mean()
        return scalar

    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate a loss."""
        loss = loss / self.share
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step_optimizer(self) -> None:
        """Step the optimiser."""
        if self.scaler is None:
            self.engine.optimizer.step()
        else:
            self.scaler.step(self.engine.optimizer)
            self.scaler.update()

    def update(self) -> None:
        """Step the optimiser and clear the gradients."""
        self.step_optimizer()
        self.engine.optimizer.zero_grad(set_to_none=self.engine.optim_set_to_none)


def _joined(first: Any, rest: Any) -> Any:
    """The rows of ``first`` and ``rest``, tensors or lists of heads."""
    if isinstance(first, (list, tuple)):
        return [torch.cat(parts) for parts in zip(first, rest, strict=True)]
    return torch.cat([first, rest])
