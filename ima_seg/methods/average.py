"""An exponential moving average of the weights that a training goes through.

As a rule it generalises better than the last weights, clean and under attack: Izmailov et al., "Averaging weights leads
to wider optima and better generalization", UAI 2018, arXiv 1803.05407; Gowal et al., "Uncovering the limits of
adversarial training against norm-bounded adversarial examples", 2020, arXiv 2010.03593.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ima_seg.attacks.network import inner_module


def bare(network: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel and torch.compile."""
    inner = inner_module(network)
    found = getattr(inner, "_orig_mod", inner)
    assert isinstance(found, nn.Module)
    return found


def _tensors(network: nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(network.parameters(), network.buffers())


class AveragedWeights:
    """The average of the weights and floating-point buffers of a network.

    Args:
        network: whose weights are averaged, also wrapped in DistributedDataParallel or torch.compile.
        decay: share of the old average that stays in an update, in [0, 1); over about 1 / (1 - decay) updates.

    The average begins at the weights of the first update.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network = bare(network)
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._mean = AveragedModel(self._network, multi_avg_fn=average, use_buffers=True)

    def update(self) -> None:
        """Move the average towards the network as it is now."""
        self._mean.update_parameters(self._network)

    @property
    def module(self) -> nn.Module:
        """A network with the average, which later updates change."""
        return self._mean.module

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Go on from an average, by the names of the bare network."""
        self.module.load_state_dict(dict(weights))
        self._mean.n_averaged.fill_(1)

    @torch.no_grad()
    def _exchange(self) -> None:
        # Not by state dict, which has tensors that modules share more than once, as U-Nets of nnU-Net do.
        for average, current in zip(_tensors(self.module), _tensors(self._network), strict=True):
            kept = average.clone()
            average.copy_(current)
            current.copy_(kept)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network has the average for its weights."""
        if self._mean.n_averaged == 0:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()
