"""A MONAI network as attacks call it: with an inferer, and with further inputs of just the samples attacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.inferers import SimpleInferer
from torch import nn
from torch.utils.checkpoint import checkpoint


class AsUsed(nn.Module):
    """The network through its inferer.

    An attack may work on part of a batch. Where there are further inputs, the samples therefore carry their number in
    one more channel, see :func:`numbered`, which is no image channel and so never perturbed.

    Args:
        network: maps (B, C, *S) and the further inputs to logits.
        inferer: a ``monai.inferers.Inferer``. With any but ``SimpleInferer`` the activations of a network pass are not
            kept for the gradient but computed again: a sliding window then needs the memory of one batch of windows.
        inputs: the further inputs, by position and by name, and the size of the batch, as for :func:`own_inputs`.
    """

    def __init__(self, network: Any, inferer: Any, *inputs: Any) -> None:
        super().__init__()
        self.network, self.inferer, self.inputs = network, inferer, inputs or ((), {}, 0)

    def forward(self, x: torch.Tensor) -> Any:
        """What the network returns for the batch, or for the part of it that ``x`` (B, C[+1], *S) is."""
        images, args, kwargs = own_inputs(x, *self.inputs)
        return self.inferer(images, self._network, *args, **kwargs)

    def _network(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if type(self.inferer) is SimpleInferer or not torch.is_grad_enabled():
            return self.network(x, *args, **kwargs)
        # Under attack there is no dropout, so that no random state has to be kept.
        return checkpoint(self.network, x, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def numbered(x: torch.Tensor) -> torch.Tensor:
    """The batch (B, C + 1, *S) whose last channel is the number of the sample."""
    numbers = torch.arange(len(x), device=x.device, dtype=x.dtype).view(-1, *(1,) * (x.ndim - 1))
    return torch.cat([x, numbers.expand(-1, 1, *x.shape[2:])], 1)


def own_inputs(
    x: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], size: int
) -> tuple[torch.Tensor, Sequence[Any], Mapping[str, Any]]:
    """Images without the numbers that :func:`numbered` gave them, and the further inputs of just these samples.

    Args:
        x: (B, C + 1, *S), or without further inputs (B, C, *S).
        args: further inputs; of tensors whose first axis is the batch, each sample gets its own part.
        kwargs: the same by name.
        size: samples of the whole batch.
    """
    if not (args or kwargs):
        return x, args, kwargs
    rows = x[:, -1].flatten(1)[:, 0].long()

    def part(value: Any) -> Any:
        batched = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == size
        return value[rows] if batched else value

    return x[:, :-1], [part(value) for value in args], {name: part(value) for name, value in kwargs.items()}
