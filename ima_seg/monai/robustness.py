"""Robustness during training: metrics of the validation set under attack, every few epochs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Events
from monai.engines.utils import default_prepare_batch
from monai.inferers import SimpleInferer
from monai.metrics import DiceMetric
from torch import nn

from ima_seg.attacks.network import frozen, full_resolution, inner_module
from ima_seg.errors import UserError
from ima_seg.monai.attack import Attack
from ima_seg.monai.batch import plain, reference
from ima_seg.monai.network import AsUsed
from ima_seg.types import Labels, Target


class RobustnessHandler:
    """Attacks a validation set every few epochs and notes MONAI's metrics on clean and on attacked images.

    The metrics go to ``engine.state.metrics`` as ``robust_NAME_clean`` and ``robust_NAME_EPS`` (with ``mean_batch``
    reductions ``_0``, ``_1``... at the end), and stay until they are measured again. There statistics handlers that are
    attached later find them, and ``CheckpointSaver(save_key_metric=True, key_metric_name="robust_dice_0.05")`` from the
    first measurement on. They also go to the ``summary_writer`` under ``robust/NAME/...``.

    Training is not touched: the network's flags are restored, the random state is that of before.
    With ``torch.distributed`` in use each rank attacks what its loader gives it, and MONAI's metrics gather.

    Args:
        loader: validation batches.
        attack: an :class:`ima_seg.monai.Attack`, or the ``labels`` of one with default settings.
        eps: budgets, per voxel in network units.
        interval: every how many epochs.
        network: to be attacked; default: that of the engine.
        inferer: how to call it; default ``SimpleInferer``. With a ``SlidingWindowInferer`` whole images are attacked
            through the window.
        metrics: MONAI metrics by name; default: ``{"dice": DiceMetric()}``, without the background where there is one.
        prepare_batch: batch, device -> (images, reference); default: that of MONAI's engines.
        discretise: (logits (B, K, *S), reference) -> what the metrics compare, both (B, K, *S); default: one-hot by
            argmax, or of regions by their sign. Ignored voxels count in neither.
        summary_writer: with ``add_scalar(tag, value, step)``, as TensorBoard's ``SummaryWriter``.
        seed: of random starts, the same in every epoch.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        attack: Any,
        *,
        eps: Sequence[float],
        interval: int = 1,
        network: nn.Module | None = None,
        inferer: Any = None,
        metrics: Mapping[str, Any] | None = None,
        prepare_batch: Callable[..., Any] = default_prepare_batch,
        discretise: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
        summary_writer: Any = None,
        seed: int = 0,
    ) -> None:
        self.attack = attack if isinstance(attack, Attack) else Attack(attack)
        if not eps or min(eps) <= 0:
            raise UserError(f"eps is {eps!r}; give one or more positive budgets, clean images are measured anyway")
        if interval < 1:
            raise UserError(f"interval is {interval}; it must be at least 1, for every epoch")
        labels = self.attack.labels
        if discretise is None and not isinstance(labels, Labels):
            raise UserError(f"give discretise, which makes of logits what the metrics compare, for labels {labels!r}")
        #: Budgets by their names; of clean images none.
        self.levels = {"clean": 0.0, **{f"{level:g}": float(level) for level in eps}}
        self.loader, self.interval, self.network = loader, interval, network
        self.inferer, self.prepare_batch, self.seed = inferer or SimpleInferer(), prepare_batch, seed
        self.discretise, self.summary_writer = discretise or self._one_hot, summary_writer
        if metrics is None:
            background = not isinstance(labels, Labels) or labels.regions
            metrics = {"dice": DiceMetric(include_background=background)}
        self.metrics = {
            (name, level): copy.deepcopy(metric) for name, metric in metrics.items() for level in self.levels
        }

    def attach(self, engine: Any) -> None:
        """Attach to a trainer, behind what ends its epochs."""
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)

    def __call__(self, engine: Any) -> None:
        """Attack the validation set and note the metrics."""
        network = inner_module(self.network if self.network is not None else engine.network)
        device = engine.state.device
        accelerators = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(accelerators), frozen(network):
            self._measure(AsUsed(network, self.inferer), device)
        for (name, level), metric in self.metrics.items():
            value = metric.aggregate()
            metric.reset()
            for suffix, number in _numbers(value):
                engine.state.metrics[f"robust_{name}_{level}{suffix}"] = number
                if self.summary_writer is not None and engine.state.rank == 0:
                    self.summary_writer.add_scalar(f"robust/{name}/{level}{suffix}", number, engine.state.epoch)

    def _measure(self, network: nn.Module, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(self.seed)
        for batch in self.loader:
            x, y = (plain(tensor) for tensor in self.prepare_batch(batch, device)[:2])
            for level, eps in self.levels.items():
                shown = self.attack(network, x, y, eps, generator).adversarial if eps else x
                with torch.no_grad():
                    predicted, expected = self.discretise(full_resolution(network(shown)), y)
                for (_, measured), metric in self.metrics.items():
                    if measured == level:
                        metric(y_pred=predicted, y=expected)

    def _one_hot(self, logits: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        target = Target.from_raw(reference(y, logits, self.attack.labels), self.attack.labels)
        flat = logits.flatten(2)
        classes = torch.arange(flat.shape[1], device=flat.device)[:, None]
        predicted = flat > 0 if target.labels.regions else flat.argmax(1, keepdim=True) == classes
        if target.valid is not None:
            predicted = predicted & target.valid
        return predicted.view(logits.shape).float(), target.onehot.view(logits.shape).float()


def _numbers(value: Any) -> list[tuple[str, float]]:
    """The numbers that a metric aggregates to, with what to append to its name."""
    if isinstance(value, (list, tuple)):
        value = value[0]  # ConfusionMatrixMetric has a list; with get_not_nans the counts come second
    numbers = torch.as_tensor(value).flatten().tolist()
    return [("", numbers[0])] if len(numbers) == 1 else [(f"_{i}", number) for i, number in enumerate(numbers)]
