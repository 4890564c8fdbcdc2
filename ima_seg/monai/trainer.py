"""IMA training in MONAI's engine: a ``SupervisedTrainer`` whose step is that of IMA."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer
from monai.losses import DeepSupervisionLoss
from monai.utils import ensure_tuple
from monai.utils.enums import CommonKeys as Keys
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ima_seg.attacks.network import allow_recompiles, full_resolution, inner_module
from ima_seg.errors import UserError
from ima_seg.methods.ima import IMA
from ima_seg.methods.settings import IMASettings
from ima_seg.monai.batch import case_ids, plain, reference, with_meta
from ima_seg.monai.margins import MarginLedgerHandler
from ima_seg.monai.network import AsUsed, numbered
from ima_seg.types import Labels

#: Settings of nnU-Net's trainers, and what says the same here.
_MONAI_NAMES = {
    "epochs": "the trainer's max_epochs",
    "iterations_per_epoch": "the trainer's epoch_length",
    "val_iterations_per_epoch": "the evaluator's epoch_length",
    "save_every": "save_interval of CheckpointSaver",
}


def make_ima(options: IMA | Mapping[str, Any], *, epochs: int) -> IMA:
    """The IMA training that a trainer's argument ``ima`` describes.

    Args:
        options: see :class:`IMASupervisedTrainer`.
        epochs: length of the training.

    Raises:
        UserError: an unknown setting or value, or no ``labels``.
    """
    if isinstance(options, IMA):
        return options
    if not isinstance(options, Mapping) or "labels" not in options:
        raise UserError(
            f"ima is {options!r}; give it the settings and how to read the outputs, ima={{'labels': 3, 'tau': 0.6}} "
            "for 3 output channels of which 0 is background, or an ima_seg.IMA"
        )
    values = dict(options)
    labels = values.pop("labels")
    if isinstance(labels, Mapping):
        labels = Labels(**labels)
    elif isinstance(labels, int):
        labels = Labels(labels)
    image_channels, voxels = values.pop("image_channels", None), values.pop("patch_voxels", None)
    for name in values.keys() & _MONAI_NAMES.keys():
        raise UserError(f"ima: {name} is a setting of nnU-Net's trainers; here it is {_MONAI_NAMES[name]}")
    settings = IMASettings.parse(values, source="ima")
    if settings.unit == "l2" and voxels is None:
        raise UserError("ima: unit 'l2' is of a whole patch; give patch_voxels, its image channels x voxels, as well")
    # Sizes per voxel do not depend on the patch.
    return IMA.from_settings(
        settings, labels=labels, patch_voxels=voxels or 1, epochs=epochs, image_channels=image_channels
    )


class IMASupervisedTrainer(SupervisedTrainer):
    """MONAI's ``SupervisedTrainer`` with IMA training; all of its arguments, events and handlers stay what they are.

    Args:
        args: of ``SupervisedTrainer``, as are ``kwargs``; ``iteration_update`` is taken.
        ima: an :class:`ima_seg.IMA`, or a mapping of its settings (:class:`ima_seg.IMASettings`) and

            - ``labels``: an :class:`ima_seg.Labels` or other object that ``IMA`` reads outputs by, its arguments as a
              mapping, or the number of output channels, of which 0 is background;
            - ``image_channels``: the first this many input channels may be perturbed (default: all);
            - ``patch_voxels``: image channels x voxels of a patch, needed with ``unit = "l2"``.
        case_key: key of the batch, or of the images' metadata, that holds the case ids. Default: the file that the
            images' metadata name, as ``LoadImaged`` notes it; the id is its folder and name.

    Images (B, C, *S) must be in network units, as normalised. The reference may be a label map, one-hot, or regions.

    Each iteration accumulates the gradient of two training passes, of the clean and of the perturbed batch, then steps
    the optimiser once. ``FORWARD_COMPLETED`` and ``LOSS_COMPLETED`` fire once, in the clean pass: ``PRED`` and ``LOSS``
    are then its whole output and its loss, and what a handler puts in their place is used.
    ``BACKWARD_COMPLETED`` fires when the gradient of both is there. From then on ``engine.state.output`` holds

    - ``IMAGE``, ``LABEL``: as in ``SupervisedTrainer``;
    - ``PRED``: the clean prediction at full resolution, detached;
    - ``LOSS``: (1 - beta) * clean + beta * adversarial loss, detached; ``clean_loss`` and ``adversarial_loss``,

    and ``engine.state.ima_report`` the :class:`ima_seg.StepReport`.

    The search attacks the network through the ``inferer`` and with the further inputs of ``prepare_batch``. The margins
    move at the end of an epoch, by the first :class:`MarginLedgerHandler` in ``train_handlers``, or one that is made.
    They are part of :meth:`state_dict`: ``CheckpointSaver(save_dict={"trainer": trainer, ...})`` saves them.

    A network with deep supervision returns a list with the full resolution first, or, as ``DynUNet`` does, the heads
    stacked (B, heads, K, *S). The loss gets what the network returns; only ``DeepSupervisionLoss``, which takes no
    stack, gets a list instead.
    """

    def __init__(self, *args: Any, ima: IMA | Mapping[str, Any], case_key: str | None = None, **kwargs: Any) -> None:
        bound = inspect.signature(SupervisedTrainer).bind(*args, **kwargs)
        given = bound.arguments
        if given.get("iteration_update") is not None:
            raise UserError(
                "iteration_update would replace the IMA step; leave it out, or train with SupervisedTrainer"
            )
        self.ima = make_ima(ima, epochs=given["max_epochs"])
        self.case_key = case_key
        handlers = ensure_tuple(given.get("train_handlers") or ())
        mine = [handler for handler in handlers if isinstance(handler, MarginLedgerHandler)][:1]
        self.margins = mine[0] if mine else MarginLedgerHandler()
        # Margins have moved before any other handler looks at them, or saves them, at the end of an epoch.
        given["train_handlers"] = [self.margins, *(handler for handler in handlers if handler is not self.margins)]
        self.loss_is_reduced = False
        super().__init__(*bound.args, **bound.kwargs)
        if self.compile:
            allow_recompiles()
            if isinstance(getattr(self.network, "_orig_mod", None), DistributedDataParallel):
                raise UserError(
                    "compile=True compiles DistributedDataParallel together with the network, and a search cannot look "
                    "inside; give network=DistributedDataParallel(torch.compile(network)) and leave compile out"
                )

    def state_dict(self) -> Any:
        """The state of the engine, and under ``ima`` that of the margins."""
        state = super().state_dict()
        state["ima"] = self.margins.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; from that of a ``SupervisedTrainer`` the margins start anew."""
        state = dict(state_dict)
        margins = state.pop("ima", None)
        super().load_state_dict(state)
        if margins is None:
            self.logger.warning("IMA: the checkpoint holds no margins; they start anew at %.4g", self.ima.ledger.delta)
        else:
            self.margins.load_state_dict(margins)

    def _iteration(self, engine: Any, batchdata: Any) -> Any:
        """One IMA step; see the class."""
        if batchdata is None:
            raise ValueError("Must provide batch data for current iteration.")
        prepared = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs)
        images, targets, args, kwargs = (*prepared, (), {}) if len(prepared) == 2 else prepared
        ids = case_ids(batchdata, images, self.case_key)
        y = reference(targets, images, self.ima.labels)
        x, victim, extended = plain(images), None, bool(args or kwargs)
        if extended or type(engine.inferer) is not SimpleInferer:
            victim = AsUsed(inner_module(engine.network), engine.inferer, args, kwargs, len(x))
        if extended:
            x, threat = numbered(x), self.ima.threat
            self.ima.threat = replace(threat, image_channels=threat.image_channels or images.shape[1])

        output = engine.state.output = {Keys.IMAGE: images, Keys.LABEL: targets}
        first, last, share = _accumulation(engine)
        engine.network.train()
        if first:
            engine.optimizer.zero_grad(set_to_none=engine.optim_set_to_none)
        passes = _Passes(engine, plain(targets), args, kwargs, share)
        report = self.ima.step(
            engine.network, x, y, ids, loss=passes.loss, backward=passes.backward, forward=passes.forward, victim=victim
        )
        if extended and report.adversarial is not None:
            report = replace(report, adversarial=report.adversarial[:, :-1])
        engine.state.ima_report, engine.state.ima_voxels = report, self.ima.threat.perturbable(x)[0].numel()
        output[Keys.LOSS] = report.loss
        output |= {"clean_loss": report.clean_loss, "adversarial_loss": report.adversarial_loss}
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if last and passes.scaler is not None:
            passes.scaler.step(engine.optimizer)
            passes.scaler.update()
        elif last:
            engine.optimizer.step()
        output[Keys.PRED] = with_meta(output[Keys.PRED], images)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output


class _Passes:
    """The two training passes of an iteration, the first of them with MONAI's events.

    Args:
        engine: the trainer.
        targets: what the loss compares with.
        args: further inputs of the network, as are ``kwargs``.
        kwargs: by name.
        share: the gradient is divided by this.
    """

    def __init__(
        self, engine: Any, targets: torch.Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], share: int
    ) -> None:
        self.engine, self.targets, self.args, self.kwargs, self.share = engine, targets, args, kwargs, share
        self.scaler = engine.scaler if engine.amp else None
        self._clean = True
        self._prediction: Any = None

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.scaler is None:
            return contextlib.nullcontext()
        return torch.autocast("cuda", **self.engine.amp_kwargs)

    def forward(self, network: nn.Module, batch: torch.Tensor) -> Any:
        """The network's output for (B, C[+1], *S), stacked heads as a list."""
        images = batch[:, :-1] if self.args or self.kwargs else batch
        with self._autocast():
            prediction = self.engine.inferer(images, network, *self.args, **self.kwargs)
            if self._clean:
                output = self.engine.state.output
                output[Keys.PRED] = prediction
                self.engine.fire_event(IterationEvents.FORWARD_COMPLETED)
                prediction = output[Keys.PRED]
        self._prediction = prediction
        stacked = isinstance(prediction, torch.Tensor) and prediction.ndim == images.ndim + 1
        return list(prediction.unbind(1)) if stacked else prediction

    def loss(self, heads: Any) -> torch.Tensor:
        """The training loss of what :meth:`forward` returned."""
        function = self.engine.loss_function
        prediction = heads if isinstance(function, DeepSupervisionLoss) else self._prediction
        self._prediction = None
        with self._autocast():
            value = self._scalar(
                function(heads if isinstance(function, DeepSupervisionLoss) else prediction, self.targets)
            )
            if not self._clean:
                return value
            self._clean = False
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
        """Backpropagate one of the two losses."""
        loss = loss / self.share
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()


def _accumulation(engine: Any) -> tuple[bool, bool, int]:
    """Whether gradients start at zero in this iteration, whether the optimiser steps, and over how many they add up."""
    count = getattr(engine, "accumulation_steps", 1)  # MONAI 1.6
    length, iteration = engine.state.epoch_length, engine.state.iteration - 1
    if length is not None:
        iteration %= length
    return iteration % count == 0, (iteration + 1) % count == 0 or iteration + 1 == length, count
