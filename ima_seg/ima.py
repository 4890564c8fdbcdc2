"""One step of increasing-margin adversarial (IMA) training, for any torch module.

Method: Ma & Liang, "Increasing-Margin Adversarial (IMA) training to improve adversarial robustness of neural networks",
arXiv 2005.09147, doi 10.1016/j.cmpb.2023.107687.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ima_seg.attacks import boundary_search, pgd
from ima_seg.attacks._rows import assign, chosen
from ima_seg.attacks.boundary import start_radius
from ima_seg.errors import UserError
from ima_seg.ledger import EpochSummary, MarginLedger
from ima_seg.model import full_resolution, inner_module
from ima_seg.ops import draw_seeds, gradient_step, hard_dice, per_row, random_start
from ima_seg.settings import IMASettings
from ima_seg.types import Labels, PassCount, Target, ThreatModel

#: On accelerators the working batch of the search shrinks in at most this many sizes.
ACCELERATOR_SIZES = 8


def _backward(loss: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class StepReport:
    """What one step did. Tensors stay on their device, detached.

    Attributes:
        loss: (1 - beta) * clean + beta * adversarial, 0-dim.
        clean_loss, adversarial_loss: 0-dim; equal where nothing was attacked.
        adversarial: the perturbed batch (B, C, *S), or None where nothing was attacked.
        searched: (B,) bool, patches whose boundary was searched: with foreground, a clean Dice of at least tau, and a
            case that does not rest.
        resting: (B,) bool, patches left out of the search because the margin of their case is steady.
        crossed: (B,) bool.
        distance: (B,) size of the perturbation, per voxel in network units.
        background: (B,) bool, patches without foreground.
        below: (B,) bool, patches whose clean Dice is below tau.
        nonfinite: (B,) bool, patches left out of the margins for a NaN or infinite gradient.
        stalled: (B,) bool, patches whose gradient was exactly zero at some step.
        passes: network passes that the perturbations took, without the two training passes.
    """

    loss: torch.Tensor
    clean_loss: torch.Tensor
    adversarial_loss: torch.Tensor
    adversarial: torch.Tensor | None
    searched: torch.Tensor
    resting: torch.Tensor
    crossed: torch.Tensor
    distance: torch.Tensor
    background: torch.Tensor
    below: torch.Tensor
    nonfinite: torch.Tensor
    stalled: torch.Tensor
    passes: PassCount


class IMA:
    """IMA training of one network: settings, margins, and the step.

    Args:
        settings: see :class:`IMASettings`.
        labels: how the network's outputs are read.
        ledger: the margins.
        image_channels: the first this many input channels may be perturbed; None means all.

    One step computes ``(1 - beta) * loss(clean) + beta * loss(adversarial)``. Its gradient is accumulated in two
    backward passes, the clean one before the search begins: the clean activations are then gone when the search needs
    room, and the peak memory is that of a standard step.
    """

    def __init__(
        self,
        settings: IMASettings,
        *,
        labels: Labels,
        ledger: MarginLedger,
        image_channels: int | None = None,
    ) -> None:
        self.settings, self.labels, self.ledger = settings, labels, ledger
        self.threat = ThreatModel(settings.norm, image_channels)

    @classmethod
    def from_settings(
        cls,
        settings: IMASettings,
        *,
        labels: Labels,
        patch_voxels: int,
        epochs: int,
        image_channels: int | None = None,
    ) -> IMA:
        """With a fresh ledger whose step and cap follow from ``settings``.

        Args:
            settings: see :class:`IMASettings`.
            labels: how the network's outputs are read.
            patch_voxels: image channels x voxels of a training patch.
            epochs: length of the training.
            image_channels: the first this many input channels may be perturbed; None means all.
        """
        delta, eps_max = settings.resolve_sizes(patch_voxels=patch_voxels, epochs=epochs)
        ledger = MarginLedger(
            delta=delta, eps_max=eps_max, rule=settings.rule, steady_interval=settings.steady_interval
        )
        return cls(settings, labels=labels, ledger=ledger, image_channels=image_channels)

    def step(
        self,
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        case_ids: Sequence[str],
        *,
        loss: Callable[[Any], torch.Tensor],
        backward: Callable[[torch.Tensor], None] = _backward,
        forward: Callable[[nn.Module, torch.Tensor], Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> StepReport:
        """Accumulate the gradient of one IMA step in ``p.grad`` and note the visits in the ledger.

        Args:
            model: network (B, C, *S) -> logits (B, K, *S), or a list with the full resolution first; also wrapped in
                DistributedDataParallel or torch.compile.
            x: batch (B, C, *S), floating point, finite, in network units.
            y: reference at full resolution, (B, 1, *S) or (B, *S) labels, or regions (B, K[+1], *S).
            case_ids: B ids; repeats are visits of their own.
            loss: training loss of the network's whole output, for this batch.
            backward: how to backpropagate a loss (a gradient scaler scales here).
            forward: how to call the network for the two training passes (autocast goes here); default ``model(x)``.
            generator: source of the random starts.

        The caller clears gradients before and steps the optimiser afterwards, once.
        """
        if len(case_ids) != len(x):
            raise UserError(f"{len(case_ids)} case ids for a batch of {len(x)}; every sample needs the id of its case")
        forward = forward or (lambda network, batch: network(batch))
        beta = self.settings.beta
        distributed = isinstance(model, DistributedDataParallel)
        # The first backward only accumulates; ranks exchange gradients in the second.
        accumulate: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if isinstance(model, DistributedDataParallel) and beta > 0:
            accumulate = model.no_sync()
        # The clean backward pass yields the gradient of its input for the price of the first layer's.
        leads = self.settings.start != "random" and 0 < beta < 1
        clean = x.detach().requires_grad_(leads)
        with accumulate:
            output = forward(model, clean)
            clean_loss = loss(output)
            target = Target.from_raw(y, self.labels)
            clean_dice = hard_dice(full_resolution(output).detach(), target)
            background = clean_dice.isnan()
            below = clean_dice < self.settings.tau
            resting = ~background & ~below & self.ledger.resting(case_ids, x.device)
            searched = ~background & ~below & ~resting
            perturbed = resting | background if self.settings.background_steps else resting
            attacked = searched | perturbed
            attack_any = beta > 0 and (distributed or bool(attacked.any()))
            del output
            backward(clean_loss * (1 - beta) if attack_any else clean_loss)
        clean_loss = clean_loss.detach()
        if not attack_any:
            return self._unattacked(clean_loss, x, searched, resting, background, below)

        eps = self.ledger.get(case_ids, x.device)
        network = inner_module(model)
        adversarial = x.detach().clone()
        crossed, finite, stalled = (torch.zeros_like(searched) for _ in range(3))
        distance = torch.zeros_like(eps)
        passes = PassCount()
        free = None
        if clean.grad is not None:
            free = self._free_step(x, clean.grad, self.settings.step_factor * eps / self.settings.steps, eps, generator)
        multiple_of = 1 if x.device.type == "cpu" else math.ceil(len(x) / ACCELERATOR_SIZES)
        if bool(searched.any()):
            found = boundary_search(
                network,
                x,
                target,
                eps=eps,
                threshold=torch.full_like(eps, self.settings.tau),
                clean_dice=clean_dice,
                settings=self.settings.search(delta=self.ledger.delta, multiple_of=multiple_of),
                threat=self.threat,
                searched=searched,
                start=free,
                precision=self.settings.precision,
                generator=generator,
            )
            adversarial, crossed, finite = found.adversarial, found.crossed, found.finite
            distance, stalled, passes = found.distance, found.stalled, found.passes
        rows = chosen(perturbed, multiple_of)
        if len(rows):
            hit = pgd(
                network,
                x[rows],
                target[rows],
                eps=eps[rows],
                steps=max(self.settings.background_steps, 1),
                step_factor=self.settings.step_factor,
                threat=self.threat,
                precision=self.settings.precision,
                generator=generator,
                keep="last",  # costs the gradient passes and nothing else
            )
            assign(adversarial, rows, perturbed[rows], hit.adversarial)
            assign(distance, rows, perturbed[rows], hit.distance)
            passes += hit.passes
        self.ledger.record(case_ids, crossed=crossed, distance=distance, counts=searched & finite)

        adversarial_loss = loss(forward(model, adversarial))
        backward(adversarial_loss * beta)
        adversarial_loss = adversarial_loss.detach()
        return StepReport(
            loss=(1 - beta) * clean_loss + beta * adversarial_loss,
            clean_loss=clean_loss,
            adversarial_loss=adversarial_loss,
            adversarial=adversarial,
            searched=searched,
            resting=resting,
            crossed=crossed,
            distance=distance,
            background=background,
            below=below,
            nonfinite=searched & ~finite,
            stalled=stalled,
            passes=passes,
        )

    def end_epoch(self) -> EpochSummary:
        """Move the margins; a collective call when ``torch.distributed`` is initialised."""
        return self.ledger.step()

    def _free_step(
        self,
        x: torch.Tensor,
        gradient: torch.Tensor,
        length: torch.Tensor,
        eps: torch.Tensor,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """The perturbation (B, image channels, *S) of one step of ``length`` (B,) along the clean ``gradient``.

        It is made from the clean batch, or from a random point (``start = "mixed"``). The scale of the gradient does
        not matter, so neither does that of a gradient scaler. Where it is zero, infinite or NaN, the random point
        remains.
        """
        image, norm = self.threat.perturbable(x), self.threat.norm
        nothing = torch.zeros_like(image, dtype=torch.promote_types(image.dtype, torch.float32))
        seeds = draw_seeds(len(x), x.device, generator)
        random = random_start(nothing, start_radius(eps, self.ledger.delta), norm, seeds)
        origin = random if self.settings.start == "mixed" else nothing
        step, size = gradient_step(origin, self.threat.perturbable(gradient), alpha=length, eps=eps, norm=norm)
        return torch.where(per_row(torch.isfinite(size) & (size > 0), step), step, random)

    def _unattacked(
        self,
        clean_loss: torch.Tensor,
        x: torch.Tensor,
        searched: torch.Tensor,
        resting: torch.Tensor,
        background: torch.Tensor,
        below: torch.Tensor,
    ) -> StepReport:
        nothing = torch.zeros_like(searched)
        return StepReport(
            loss=clean_loss,
            clean_loss=clean_loss,
            adversarial_loss=clean_loss,
            adversarial=None,
            searched=nothing if self.settings.beta == 0 else searched,
            resting=nothing if self.settings.beta == 0 else resting,
            crossed=nothing,
            distance=torch.zeros(len(x), device=x.device),
            background=background,
            below=below,
            nonfinite=nothing,
            stalled=nothing,
            passes=PassCount(),
        )
