"""Adversarial training in MONAI's engine: a ``SupervisedTrainer`` whose step is that of a method."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer
from monai.utils import ensure_tuple
from monai.utils.enums import CommonKeys as Keys
from torch.nn.parallel import DistributedDataParallel

from ima_seg.attacks.network import allow_recompiles, inner_module
from ima_seg.errors import UserError
from ima_seg.methods import registry
from ima_seg.methods.base import Method
from ima_seg.methods.ima import IMA
from ima_seg.monai.batch import case_ids, plain, reference, with_meta
from ima_seg.monai.handler import TrainingHandler
from ima_seg.monai.network import AsUsed, numbered
from ima_seg.monai.passes import Passes
from ima_seg.monai.units import channel_sd
from ima_seg.types import Labels

#: A unit of sizes of more SDs than this, or of less than one over it, is warned about.
FAR = 2
#: Settings of nnU-Net's trainers, and what says the same here.
_MONAI_NAMES = {
    "epochs": "the trainer's max_epochs",
    "iterations_per_epoch": "the trainer's epoch_length",
    "val_iterations_per_epoch": "the evaluator's epoch_length",
    "save_every": "save_interval of CheckpointSaver",
    "ema": "ignite.handlers.EMAHandler(network, momentum=1 - ema) among the train_handlers",
}


def make_method(
    options: Method[Any, Any] | Mapping[str, Any], *, epochs: int, name: str | None = None
) -> Method[Any, Any]:
    """The method that a trainer's argument describes, by ``name`` where ``options`` do not say it.

    Raises:
        UserError: an unknown method, setting or value, or no ``labels``.
    """
    if isinstance(options, Method) and name in (None, options.settings.section):
        return options
    values = dict(options) if isinstance(options, Mapping) else {}
    name = name or values.pop("name", None)
    if name is None or "labels" not in values:
        raise UserError(
            f"{options!r} describes no method; give its name, settings and how to read the outputs, method={{'name': "
            "'trades', 'labels': 3, 'eps': 0.1} or ima={'labels': 3, 'tau': 0.6} for 3 output channels of which 0 is "
            "background, or a method of ima_seg.methods"
        )
    labels = values.pop("labels")
    if isinstance(labels, Mapping | int):
        labels = Labels(**labels) if isinstance(labels, Mapping) else Labels(labels)
    patch_voxels = values.pop("patch_voxels", None)
    names = ("image_channels", "channel_sd", "bounds", "masked", "teacher")
    more = {key: values.pop(key) for key in names if key in values}
    if isinstance(more.get("teacher"), str):
        raise UserError(f"{name}: teacher is {more['teacher']!r}; give the trained network itself")
    for setting in values.keys() & _MONAI_NAMES.keys():
        raise UserError(f"{name}: {setting} is a setting of nnU-Net's trainers; here it is {_MONAI_NAMES[setting]}")
    base = registry.preset(name)
    settings = type(base).parse(values, source=name, base=base)
    return registry.make_method(settings, labels=labels, patch_voxels=patch_voxels, epochs=epochs, **more)


class AdversarialSupervisedTrainer(SupervisedTrainer):
    """MONAI's ``SupervisedTrainer`` with another step; all of its arguments, events and handlers stay what they are.

    Args:
        args: of ``SupervisedTrainer``, as are ``kwargs``; ``iteration_update`` is taken.
        method: a method of :mod:`ima_seg.methods`, or a mapping of its ``name``, its settings and

            - ``labels``: an :class:`ima_seg.Labels` or :class:`ima_seg.Classes`, arguments of the former as a mapping,
              or the number of output channels, of which 0 is background;
            - ``image_channels``: the first this many input channels may be perturbed (default: all);
            - ``patch_voxels``: image channels x voxels of a patch, needed with ``unit = "l2"``;
            - ``channel_sd``: standard deviation (SD) of each image channel, in whose units sizes are (default: 1);
            - ``bounds``, ``masked``: what is not perturbed, see :class:`ima_seg.ThreatModel`;
            - ``teacher``: a trained network to whose predictions of clean images training is held.
        case_key: key of the batch, or of the images' metadata, that holds the case ids, which IMA needs. Default: the
            file that the images' metadata name, as ``LoadImaged`` notes it; the id is its folder and name.

    Images (B, C, *S) must be in network units, as normalised; the log says what SD those of the first batch have. The
    reference may be a label map, one-hot, or regions.

    Each iteration accumulates the gradient of the method's training passes, of IMA that of the clean and of the
    perturbed batch, then steps the optimiser. ``FORWARD_COMPLETED`` and ``LOSS_COMPLETED`` fire once, in the first pass
    (TRADES: for the clean half of its batch): ``PRED`` and ``LOSS`` are then its output and its loss, and what a
    handler puts in their place is used. ``BACKWARD_COMPLETED`` fires when all of the gradient is there. From then on
    ``engine.state.output`` holds ``IMAGE`` and ``LABEL`` as in ``SupervisedTrainer``, ``PRED``, the prediction of the
    first pass at full resolution, ``LOSS``, the loss of the whole step, and of IMA ``clean_loss`` and
    ``adversarial_loss``. The report of the step is in ``engine.state`` by the section of the settings: ``ima_report``.
    Attacks go through the ``inferer`` and with the further inputs of ``prepare_batch``.

    Epochs are ended by the first :class:`TrainingHandler` in ``train_handlers``, or one that is made. What a method
    keeps, such as margins, is part of :meth:`state_dict`: ``CheckpointSaver(save_dict={"trainer": trainer, ...})``
    saves it. A method that makes several updates from a batch accumulates no gradients over batches.

    A network with deep supervision returns a list with the full resolution first, or, as ``DynUNet`` does, the heads
    stacked (B, heads, K, *S). The loss gets what the network returns; only ``DeepSupervisionLoss``, which takes no
    stack, gets a list instead.
    """

    #: Of the method, where it is always the same.
    _name: str | None = None

    def __init__(
        self, *args: Any, method: Method[Any, Any] | Mapping[str, Any], case_key: str | None = None, **kwargs: Any
    ) -> None:
        bound = inspect.signature(SupervisedTrainer).bind(*args, **kwargs)
        given = bound.arguments
        if given.get("iteration_update") is not None:
            raise UserError(
                "iteration_update would replace the method's step; leave it out, or train with SupervisedTrainer"
            )
        self.method = make_method(method, epochs=given["max_epochs"], name=self._name)
        if given.get("accumulation_steps", 1) > 1 and self.method.updates_per_batch > 1:
            raise UserError(
                f"{self.method.name} makes {self.method.updates_per_batch} updates from each batch, so that gradients "
                "cannot accumulate over batches; leave accumulation_steps out"
            )
        self.case_key = case_key
        handlers = ensure_tuple(given.get("train_handlers") or ())
        self.training = next((h for h in handlers if isinstance(h, TrainingHandler)), None) or TrainingHandler()
        # Margins have moved before any other handler looks at them, or saves them, at the end of an epoch.
        given["train_handlers"] = [self.training, *(handler for handler in handlers if handler is not self.training)]
        self.loss_is_reduced = self._unit_said = False
        super().__init__(*bound.args, **bound.kwargs)
        if self.compile:
            allow_recompiles()
            if isinstance(getattr(self.network, "_orig_mod", None), DistributedDataParallel):
                raise UserError(
                    "compile=True compiles DistributedDataParallel together with the network, and a search cannot look "
                    "inside; give network=DistributedDataParallel(torch.compile(network)) and leave compile out"
                )

    def state_dict(self) -> Any:
        """The state of the engine, and under the section of the settings (``ima``) that of the method."""
        state = super().state_dict()
        state[self.method.settings.section] = self.training.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; from that of a ``SupervisedTrainer`` the method starts anew."""
        state = dict(state_dict)
        mine = state.pop(self.method.settings.section, None)
        super().load_state_dict(state)
        if mine is None:
            self.logger.warning("%s: the checkpoint holds %s", self.method.name, self.method.absent())
        else:
            self.training.load_state_dict(mine)

    def _iteration(self, engine: Any, batchdata: Any) -> Any:
        """One step of the method; see the class."""
        if batchdata is None:
            raise ValueError("Must provide batch data for current iteration.")
        prepared = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs)
        images, targets, args, kwargs = (*prepared, (), {}) if len(prepared) == 2 else prepared
        method, section = self.method, self.method.settings.section
        ids = case_ids(batchdata, images, self.case_key) if method.uses_cases else [""] * len(images)
        y = reference(targets, images, method.labels)
        x, victim, extended = plain(images), None, bool(args or kwargs)
        if not self._unit_said:
            self._unit_said = True
            self._say_unit(method.threat.perturbable(x))
        if extended or type(engine.inferer) is not SimpleInferer:
            victim = AsUsed(inner_module(engine.network), engine.inferer, args, kwargs, len(x))
        if extended:
            x, threat = numbered(x), method.threat
            method.threat = replace(threat, image_channels=threat.image_channels or images.shape[1])

        output = engine.state.output = {Keys.IMAGE: images, Keys.LABEL: targets}
        first, last, share = _accumulation(engine)
        engine.network.train()
        if first:
            engine.optimizer.zero_grad(set_to_none=engine.optim_set_to_none)
        passes = Passes(engine, plain(targets), args, kwargs, len(x), share)
        report = method.step(
            engine.network, x, y, ids, loss=passes.loss, backward=passes.backward, forward=passes.forward,
            update=passes.update, victim=victim,
        )  # fmt: skip
        if extended and getattr(report, "adversarial", None) is not None:
            report = replace(report, adversarial=report.adversarial[:, :-1])
        setattr(engine.state, f"{section}_report", report)
        setattr(engine.state, f"{section}_voxels", method.threat.perturbable(x)[0].numel())
        output[Keys.LOSS] = report.loss
        output |= {name: getattr(report, name) for name in method.losses}
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if last:
            passes.step_optimizer()
        output[Keys.PRED] = with_meta(output[Keys.PRED], images)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    def _say_unit(self, x: torch.Tensor) -> None:
        """How far the unit of sizes is from the standard deviation of each channel of a batch (B, C, *S)."""
        measured, name = channel_sd(x.transpose(0, 1).cpu()), self.method.name
        ratios = [
            unit / sd for unit, sd in zip(self.method.channel_sd or [1.0] * len(measured), measured, strict=False)
        ]
        sds = ", ".join(f"{ratio:.3g}" for ratio in ratios)
        self.logger.info("%s: 1 in sizes is %s SD of the channels of the first batch", name, sds)
        if not all(1 / FAR < ratio < FAR for ratio in ratios):
            self.logger.warning(
                "%s: 1 in sizes should be 1 SD of each channel, but is %s SD of those of the first batch: normalise to "
                "an SD of 1, or say with labels and settings what it is, channel_sd=[%s]",
                name, sds, ", ".join(f"{sd:.3g}" for sd in measured),
            )  # fmt: skip


class IMASupervisedTrainer(AdversarialSupervisedTrainer):
    """:class:`AdversarialSupervisedTrainer` by IMA.

    Args:
        args: of ``SupervisedTrainer``, as are ``kwargs``.
        ima: an :class:`ima_seg.IMA`, or a mapping of its settings (:class:`ima_seg.IMASettings`), ``labels`` and more
            as for ``method``.
    """

    _name = "ima"

    def __init__(self, *args: Any, ima: IMA | Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, method=ima, **kwargs)

    @property
    def ima(self) -> IMA:
        """The training."""
        assert isinstance(self.method, IMA)
        return self.method


def _accumulation(engine: Any) -> tuple[bool, bool, int]:
    """Whether gradients start at zero in this iteration, whether the optimiser steps, and over how many they add up."""
    count = getattr(engine, "accumulation_steps", 1)  # MONAI 1.6
    length, iteration = engine.state.epoch_length, engine.state.iteration - 1
    if length is not None:
        iteration %= length
    return iteration % count == 0, (iteration + 1) % count == 0 or iteration + 1 == length, count
