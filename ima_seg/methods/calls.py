"""How a training computes: its network, loss, passes and updates, as a step is given them."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ima_seg.errors import UserError
from ima_seg.types import Network

#: Samples of a batch: all, or those of some indices (n,).
Rows = slice | torch.Tensor
EVERY = slice(None)
#: The training loss of a network's whole output for some samples of the batch, 0-dim.
Loss = Callable[[Any, Rows], torch.Tensor]


def map_heads(output: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """``function`` of a network's output, or of each of its heads, as a list."""
    return [function(head) for head in output] if isinstance(output, (list, tuple)) else function(output)


def plain_backward(loss: torch.Tensor) -> None:
    """Backpropagate without a gradient scaler."""
    loss.backward()  # type: ignore[no-untyped-call]


def check_loss(loss: Callable[..., torch.Tensor]) -> None:
    """Refuse a loss that does not take output and rows.

    Raises:
        UserError: with what to write instead.
    """
    try:
        inspect.signature(loss).bind(None, EVERY)
    except TypeError:
        raise UserError(
            "loss takes the network's output alone; a part of the batch may be perturbed, so give it the rows as well: "
            "loss=lambda output, rows: criterion(output, y[rows])"
        ) from None
    except ValueError:
        pass  # callables that do not tell what they take


@dataclass(frozen=True)
class Calls:
    """How a training computes; see :meth:`ima_seg.methods.Method.step`.

    ``network`` is what attacks call, ``forward`` and ``update`` are never None.
    """

    model: nn.Module
    network: Network
    loss: Loss
    forward: Callable[[nn.Module, torch.Tensor], Any]
    backward: Callable[[torch.Tensor], None]
    update: Callable[[], object]
    generator: torch.Generator | None

    def exchanging(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        """Of several ranks, gradients of a backward pass inside are exchanged only if ``wanted``."""
        if isinstance(self.model, DistributedDataParallel) and not wanted:
            return self.model.no_sync()
        return contextlib.nullcontext()

    def accumulate(self, *terms: tuple[torch.Tensor, Rows, float]) -> torch.Tensor:
        """Accumulate the gradient of a weighted sum of losses; returns the sum, 0-dim.

        Each term is a batch (n, C, *S), which samples it is made of, and its weight. They come one after the other, so
        that the memory is that of one. Of several ranks, gradients are exchanged in the last.
        """
        wanted = [term for term in terms if term[2] > 0]
        total = torch.zeros((), device=wanted[0][0].device)
        for index, (batch, rows, weight) in enumerate(wanted):
            with self.exchanging(index == len(wanted) - 1):
                value = self.loss(self.forward(self.model, batch), rows) * weight
                self.backward(value)
            total = total + value.detach()
        return total

    def some(self, x: torch.Tensor, share: float) -> Rows:
        """A ``share`` of the samples of ``x``, rounded up, drawn at random: their indices (n,) in order."""
        count = math.ceil(share * len(x))
        if count == len(x):
            return EVERY
        drawn = torch.rand(len(x), device=x.device, generator=self.generator)
        return drawn.argsort()[:count].sort().values
