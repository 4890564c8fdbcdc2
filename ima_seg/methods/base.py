"""What all ways to train have in common: the step, and what a course of training asks of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn
from typing_extensions import Self

from ima_seg.attacks import UNTARGETED, Goal, Problem
from ima_seg.attacks.losses import divergence
from ima_seg.attacks.network import Scale, Scaled, frozen, full_resolution, inner_module
from ima_seg.errors import UserError
from ima_seg.files import write_csv
from ima_seg.methods.calls import Calls, Loss, Rows, check_loss, plain_backward
from ima_seg.methods.settings import TrainingSettings
from ima_seg.types import Classes, Labels, Network, PassCount, Target, ThreatModel

S = TypeVar("S", bound=TrainingSettings)
R = TypeVar("R", bound="MethodReport")


@dataclass(frozen=True, kw_only=True)
class MethodReport:
    """What a step did.

    Attributes:
        loss: that the gradient belongs to, 0-dim, detached; of several updates the mean.
        passes: of the network over samples that perturbations took.
        training: passes over samples with the gradient of the parameters.
        patches: samples of the batch.
    """

    loss: torch.Tensor
    passes: PassCount
    training: int
    patches: int

    def rescaled(self, scale: Scale) -> Self:
        """The same with images in network units, which were in SDs."""
        return self


class Method(ABC, Generic[S, R]):
    """A way to train for robustness.

    Args:
        settings: of the method.
        labels: how the network's outputs are read.
        patch_voxels: image channels x voxels of a training patch; not needed with sizes per voxel.
        epochs: length of the training.
        image_channels: the first this many input channels may be perturbed; None means all.
        channel_sd: network units per standard deviation (SD) of each image channel of the network's input, where the
            normalisation does not make it 1. Sizes are in SDs.
        bounds: of each image channel, between which perturbed voxels stay, see :class:`ima_seg.ThreatModel`.
        masked: channels whose outside, where all are 0, is not perturbed, see there.
        teacher: a trained network of the same outputs, to whose predictions of clean samples training is held (see
            ``teacher_weight`` of the settings). It stays as it is.

    Raises:
        UserError: settings that name a teacher, but none is given; ``labels`` of classifiers, for a method that is for
            segmentations.
    """

    #: Network units per standard deviation (SD) of each image channel of the network's input: what sizes are in units
    #: of. None: 1, as normalised to.
    channel_sd: Sequence[float] | None
    #: How logs and files call it.
    name: ClassVar[str]
    settings_class: ClassVar[type[TrainingSettings]]
    #: Whether it must know whose sample is whose; others need ids of the right number and no more.
    uses_cases: ClassVar[bool] = False
    #: What a history has of its reports: the means of these losses, 0-dim, and counts of these flags (B,).
    losses: ClassVar[tuple[str, ...]] = ("loss",)
    counts: ClassVar[tuple[str, ...]] = ()
    #: Columns of the history to be watched during a training.
    metrics: ClassVar[tuple[str, ...]] = ("loss", "passes_per_sample")
    #: Whether it trains classifiers.
    classifies: ClassVar[bool] = True

    def __init__(
        self,
        settings: S,
        *,
        labels: Labels | Classes,
        patch_voxels: int | None = None,
        epochs: int = 1,
        image_channels: int | None = None,
        channel_sd: Sequence[float] | None = None,
        bounds: Sequence[tuple[float, float] | None] = (),
        masked: Sequence[int] = (),
        teacher: nn.Module | None = None,
    ) -> None:
        if teacher is None and settings.teacher is not None:
            raise UserError(
                f"{self.name}: the settings name the teacher {settings.teacher!r}; give its network as teacher as well"
            )
        if isinstance(labels, Classes) and not self.classifies:
            raise UserError(f"{self.name} is for segmentations; train a classifier by another method, such as PGDAT")
        if settings.unit == "l2" and patch_voxels is None:
            raise UserError(
                f"{self.name}: unit 'l2' is of a whole patch; give patch_voxels, its image channels x voxels, as well"
            )
        self.settings, self.labels, self.epochs, self.channel_sd = settings, labels, epochs, channel_sd
        self.teacher = teacher
        self._scaled: Scaled | None = None
        self.threat = ThreatModel(settings.norm, image_channels, tuple(bounds), tuple(masked))
        #: Turns a size of the settings into one per voxel in SDs.
        self.per_voxel = settings.per_voxel(patch_voxels or 1)
        #: Share of the training that is over, in [0, 1].
        self.progress = 0.0

    @classmethod
    def from_settings(cls, settings: S, *, patch_voxels: int | None, epochs: int, **given: Any) -> Self:
        """With what follows from the settings; arguments as for the class, patch and length without a default."""
        return cls(settings, patch_voxels=patch_voxels, epochs=epochs, **given)

    def step(
        self,
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        case_ids: Sequence[str],
        *,
        loss: Loss,
        update: Callable[[], object] | None = None,
        backward: Callable[[torch.Tensor], None] = plain_backward,
        forward: Callable[[nn.Module, torch.Tensor], Any] | None = None,
        victim: Network | None = None,
        generator: torch.Generator | None = None,
    ) -> R:
        """Accumulate the gradient of one step in ``p.grad``; of IMA, also note the visits in the ledger.

        Args:
            model: network (B, C, *S) -> logits (B, K, *S), or a list with the full resolution first; also wrapped in
                DistributedDataParallel or torch.compile. A classifier yields logits (B, K).
            x: batch (B, C, *S), floating point, finite, in network units.
            y: reference at full resolution, (B, 1, *S) or (B, *S) labels, or regions (B, K[+1], *S). Of a classifier
                classes (B,) or (B, 1), or labels (B, K) of 0 and 1.
            case_ids: B ids; repeats are visits of their own.
            loss: ``(output, rows) -> `` training loss, 0-dim, of the network's whole output for the samples ``rows`` of
                this batch: all of it, ``slice(None)``, or indices (n,). As a rule
                ``lambda output, rows: criterion(output, y[rows])``.
            update: steps the optimiser and clears the gradients; needed by a method that makes several updates from a
                batch, which calls it between them.
            backward: how to backpropagate a loss (a gradient scaler scales here).
            forward: how to call the network for the training passes (autocast goes here); default ``model(x)``.
            victim: what is attacked where that is not the network itself: the network as it is used, with its tiling or
                further inputs.
            generator: source of randomness.

        Raises:
            UserError: not one id for each sample; no ``update`` for a method that needs it; a loss without rows.

        The caller clears gradients before and makes the last update afterwards.
        """
        if len(case_ids) != len(x):
            raise UserError(f"{len(case_ids)} case ids for a batch of {len(x)}; every sample needs the id of its case")
        if update is None and self.updates_per_batch > 1:
            raise UserError(
                f"{self.name} makes {self.updates_per_batch} updates from each batch; give update, which steps the "
                "optimiser and clears the gradients"
            )
        check_loss(loss)
        calls = Calls(
            model=model,
            network=inner_module(model) if victim is None else victim,
            loss=loss,
            forward=forward or (lambda network, batch: network(batch)),
            backward=backward,
            update=update or (lambda: None),
            generator=generator,
        )
        target, x = Target.from_raw(y, self.labels), x.detach()
        if self.channel_sd is None:
            return self._taught_step(calls, x, target, case_ids)
        calls, scale = self._in_sd(calls, x)
        return self._taught_step(calls, x / scale.factor, target, case_ids).rescaled(scale)

    def _taught_step(self, calls: Calls, x: torch.Tensor, target: Target, case_ids: Sequence[str]) -> R:
        """The step, with every loss held to the teacher's predictions of the clean samples, if there is one."""
        if self.teacher is None:
            return self._step(calls, x, target, case_ids)
        with frozen(self.teacher), torch.no_grad():
            expected = full_resolution(calls.forward(self.teacher, x))

        def loss(output: Any, rows: Rows) -> torch.Tensor:
            apart = divergence(full_resolution(output), target[rows], clean=expected[rows]).mean()
            return calls.loss(output, rows) + self.settings.teacher_weight * apart

        report = self._step(replace(calls, loss=loss), x, target, case_ids)
        return replace(report, passes=report.passes + PassCount(forwards=len(x)))

    def problem(self, calls: Calls, x: torch.Tensor, target: Target, goal: Goal = UNTARGETED) -> Problem:
        """What an attack is given: the network, samples (n, C, *S) in SDs, and what may be done to them."""
        return Problem(
            calls.network, x, target, self.threat, goal, support=self.threat.support(x),
            precision=self.settings.precision, generator=calls.generator,
        )  # fmt: skip

    def _in_sd(self, calls: Calls, x: torch.Tensor) -> tuple[Calls, Scale]:
        """``calls`` whose networks take batches like ``x`` in SDs, and what makes network units of those."""
        assert self.channel_sd is not None
        # Kept from step to step, for CUDA graphs are those of one network.
        scaled = self._scaled
        if scaled is None or scaled.network is not calls.network or not scaled.scale.fits(x):
            scaled = self._scaled = Scaled(calls.network, Scale(self.channel_sd, x))
        forward, scale = calls.forward, scaled.scale
        return replace(calls, network=scaled, forward=lambda model, batch: forward(model, scale(batch))), scale

    @abstractmethod
    def _step(self, calls: Calls, x: torch.Tensor, target: Target, case_ids: Sequence[str]) -> R: ...

    @property
    def updates_per_batch(self) -> int:
        """How often a batch is used."""
        return 1

    def start_epoch(self, epoch: int) -> None:
        """Begin the epoch of this number, from 0."""
        self.progress = epoch / self.epochs

    def end_epoch(self) -> object:
        """End an epoch; a collective call when ``torch.distributed`` is initialised."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the network, as plain tensors and JSON types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""

    # --- what a course of training tells, see ima_seg.methods.course -------------------------------------------------

    @abstractmethod
    def sizes(self) -> dict[str, float]:
        """The settings that are sizes, per voxel in SDs."""

    def enter_cases(self, cases: Iterable[str]) -> list[str]:
        """Meet the training cases; returns what is to be said about them."""
        return []

    def columns(self, totals: Mapping[str, float]) -> dict[str, Any]:
        """End an epoch, of which ``totals`` are the sums; returns the columns that the history has of this method."""
        self.end_epoch()
        return {}

    def lines(self, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """What the log says about the last epoch of ``history``."""
        row = history[-1]
        return [
            f"{self.name}: loss {row['loss']:.4f}, {row['passes_per_sample']:.1f} passes per patch for the perturbation"
        ]

    def warnings(self, row: Mapping[str, Any]) -> list[str]:
        """What is wrong in an epoch, given its row of the history."""
        return []

    def write_files(
        self, folder: Path, history: Sequence[Mapping[str, Any]], *, voxels: int, native: Mapping[str, float]
    ) -> None:
        """Write ``NAME_history.csv``.

        Args:
            folder: where to.
            history: rows, one for each epoch.
            voxels: image channels x voxels of a training patch.
            native: native intensity units (HU, scanner units) per SD of each channel, where they are the same for all
                cases.
        """
        write_csv(folder / f"{self.name.lower()}_history.csv", history)

    def absent(self) -> str:
        """What a checkpoint of another training lacks, and what follows, for the log."""
        return f"no state of a {self.name} training; its history starts anew"

    def saved(self) -> dict[str, Any]:
        """Its part of the state of a course."""
        return {"method": self.name, "method_state": self.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`saved`."""
        if state.get("method") != self.name:
            raise UserError(f"the checkpoint is of a training by {state.get('method', 'IMA')}, not by {self.name}")
        self.load_state_dict(state["method_state"])
