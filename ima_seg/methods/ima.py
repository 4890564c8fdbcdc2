"""One step of increasing-margin adversarial (IMA) training, for any torch module.

Method: Ma & Liang, "Increasing-Margin Adversarial (IMA) training to improve adversarial robustness of neural networks",
arXiv 2005.09147, doi 10.1016/j.cmpb.2023.107687.

Of a classifier, the loss for a batch of B images x with classes y is that of the authors' code:

    L = (1 - beta) L0 + beta L1,   L0 = 1/B sum over all of CE(x, y),   L1 = 1/B sum over the right of CE(x', y),

the *right* being those that are classified correctly without perturbation. x' lies on the decision boundary where it is
crossed within the image's margin, else it is the last point of the search. Images that are wrong are trained on as they
are, at the weight 1 - beta, and their margins stay. L1 is divided by B however few are right, so that a network that
seldom is yet is little burdened with perturbations. (The authors' scripts also leave out of L1 what did not cross.)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from ima_seg.attacks import BoundaryResult, GraphedPasses, Problem, boundary_search, pgd
from ima_seg.attacks.boundary import start_radius
from ima_seg.attacks.network import Scale, full_resolution, mode_matters
from ima_seg.attacks.passes import as_attacked
from ima_seg.attacks.quality import class_quality, hard_quality, loss_quality
from ima_seg.attacks.rows import assign, chosen
from ima_seg.errors import UserError
from ima_seg.methods.base import MethodReport
from ima_seg.methods.calls import EVERY, Calls, map_heads
from ima_seg.methods.ima_settings import IMASettings
from ima_seg.methods.ledger import MarginLedger
from ima_seg.methods.margins import WithMargins
from ima_seg.ops import gradient_step, hard_dice, per_row
from ima_seg.types import Classes, Labels, PassCount, Target

#: On accelerators the working batch of the search shrinks in at most this many sizes.
ACCELERATOR_SIZES = 8


@dataclass(frozen=True, kw_only=True)
class StepReport(MethodReport):
    """What one step of IMA did. Tensors stay on their device, detached.

    Attributes:
        loss: (1 - beta) * clean + beta * adversarial, 0-dim.
        clean_loss, adversarial_loss: 0-dim; equal where nothing was attacked. The adversarial one is that of the whole
            batch, which includes a classifier's wrong images, though they have no part in its gradient.
        adversarial: the batch (B, C, *S), some of it perturbed, or None where nothing was attacked.
        searched: (B,) bool, patches whose boundary was searched: of the share, with foreground, and not below the
            criterion's threshold without perturbation.
        crossed: (B,) bool.
        distance: (B,) size of the perturbation, per voxel in SDs.
        background: (B,) bool, patches without foreground; none for classifiers.
        below: (B,) bool, patches that have crossed without perturbation, images that are classified wrongly.
        nonfinite: (B,) bool, patches left out of the margins for a NaN or infinite gradient.
        stalled: (B,) bool, patches whose gradient was exactly zero at some step.

    ``passes`` are without the two training passes and a classifier's check.
    """

    clean_loss: torch.Tensor
    adversarial_loss: torch.Tensor
    adversarial: torch.Tensor | None
    searched: torch.Tensor
    crossed: torch.Tensor
    distance: torch.Tensor
    background: torch.Tensor
    below: torch.Tensor
    nonfinite: torch.Tensor
    stalled: torch.Tensor

    @override
    def rescaled(self, scale: Scale) -> StepReport:
        return self if self.adversarial is None else replace(self, adversarial=scale(self.adversarial))


class IMA(WithMargins[StepReport]):
    """IMA training of one network: settings, margins, and the step.

    Args:
        settings: see :class:`IMASettings`.
        labels: how the network's outputs are read.
        ledger: the margins; default: a fresh one, whose step and cap follow from the settings, the patch and the length
            of the training.
        patch_voxels: image channels x voxels of a training patch; not needed with sizes per voxel.
        epochs: length of the training; not needed with a ledger.
        image_channels: the first this many input channels may be perturbed; None means all.
        given: channel_sd, bounds, masked and teacher, see :class:`ima_seg.methods.base.Method`.

    One step computes ``(1 - beta) * loss(clean) + beta * loss(adversarial)``, the second for a ``share`` of the batch,
    drawn at random, of which alone the boundary is searched; of a classifier only the images that are
    right without perturbation count in the second term, and the loss must be a mean over images. The gradient is
    accumulated in two backward passes, the clean one before the search begins: the clean activations are then gone when
    the search needs room, and the peak memory is that of a standard step.
    """

    def __init__(
        self,
        settings: IMASettings,
        *,
        labels: Labels | Classes,
        ledger: MarginLedger | None = None,
        patch_voxels: int | None = None,
        epochs: int | None = None,
        image_channels: int | None = None,
        **given: Any,
    ) -> None:
        if isinstance(labels, Classes):
            settings.check_classes()
        # A ledger has its sizes per voxel.
        voxels = patch_voxels if ledger is None else patch_voxels or 1
        super().__init__(
            settings, labels=labels, patch_voxels=voxels, epochs=epochs or 1, image_channels=image_channels, **given
        )
        if ledger is None:
            if epochs is None:
                raise UserError(
                    "IMA without a ledger plans one for the length of the training; give epochs, or a ledger"
                )
            delta, eps_max = settings.resolve_sizes(patch_voxels=voxels or 1, epochs=epochs)
            ledger = MarginLedger(
                delta=delta, eps_max=eps_max, rule=settings.rule, crossing_share=settings.crossing_share
            )
        self.ledger = ledger
        self._graphs = GraphedPasses() if settings.cuda_graphs == "on" else None

    def _step(self, calls: Calls, x: torch.Tensor, target: Target, case_ids: Sequence[str]) -> StepReport:
        settings, beta = self.settings, self.settings.beta
        # The clean backward pass yields the gradient of its input for the price of the first layer's.
        clean = x.detach().requires_grad_(settings.start != "random" and 0 < beta < 1)
        # The first backward only accumulates; ranks exchange gradients in the second.
        rows = calls.some(x, settings.share)
        with calls.exchanging(beta == 0):
            output = calls.forward(calls.model, clean)
            clean_loss = calls.loss(output, EVERY)
            logits = full_resolution(output).detach()
            if calls.model.training and beta > 0 and mode_matters(calls.model):
                # What is good in training may be bad in evaluation mode, in which the search would find a boundary at
                # no distance.
                logits = as_attacked(calls.network, x, settings.precision)
            quality, threshold, background = self._criterion(logits, target)
            below = ~background & (quality < threshold)
            nothing = torch.zeros_like(below)
            drawn = nothing.clone()
            drawn[rows] = True
            searched = drawn & ~background & ~below
            perturbed = drawn & background if settings.background_steps else nothing
            attacked = searched | perturbed
            attack = beta > 0 and (isinstance(calls.model, DistributedDataParallel) or bool(attacked.any()))
            del output, logits
            calls.backward(clean_loss * (1 - beta) if attack or target.whole_image else clean_loss)
        loss = clean_loss = adversarial_loss = clean_loss.detach()
        found = BoundaryResult(
            adversarial=x.clone() if attack else x, crossed=nothing, finite=nothing,
            distance=torch.zeros(len(x), device=x.device), stalled=nothing, passes=PassCount(),
        )  # fmt: skip

        def of_attacked(head: torch.Tensor) -> torch.Tensor:
            """``head``, whose gradient comes from the attacked samples alone; all its values stay."""
            return torch.where(per_row(attacked[rows], head), head, head.detach())

        if attack:
            eps = self.ledger.get(case_ids, x.device)
            problem = self.problem(calls, x, target)
            start = None if clean.grad is None else self._free_step(problem, clean.grad, eps)
            with self._graphs or contextlib.nullcontext():
                found = self._perturb(problem, eps, found, quality, threshold, searched, perturbed, start)
            output = calls.forward(calls.model, found.adversarial[rows])
            adversarial_loss = calls.loss(map_heads(output, of_attacked) if target.whole_image else output, rows)
            calls.backward(adversarial_loss * beta)
            adversarial_loss = adversarial_loss.detach()
            loss = (1 - beta) * clean_loss + beta * adversarial_loss
        if beta > 0:
            self.ledger.record(
                case_ids, crossed=found.crossed, distance=found.distance, counts=searched & found.finite, below=below,
                background=background,
            )  # fmt: skip
        searched, count = searched if attack else nothing, len(found.adversarial[rows]) if attack else 0
        return StepReport(
            loss=loss, clean_loss=clean_loss, adversarial_loss=adversarial_loss,
            adversarial=found.adversarial if attack else None, searched=searched, crossed=found.crossed,
            distance=found.distance, background=background, below=below, nonfinite=searched & ~found.finite,
            stalled=found.stalled, passes=found.passes, training=len(x) + count, patches=len(x),
        )  # fmt: skip

    def _criterion(self, logits: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the clean ``logits``: quality, the threshold it must not fall below, who has no foreground; (B,) all."""
        if target.whole_image:
            quality = class_quality(logits, target)[0]
            return quality, torch.zeros_like(quality), torch.zeros_like(quality, dtype=torch.bool)
        dice = hard_dice(logits, target)
        criterion, tau = self.settings.criterion, self.settings.tau
        if criterion == "loss":
            return loss_quality(logits, target)[0], torch.full_like(dice, -tau), dice.isnan()
        absolute = torch.full_like(dice, tau)
        # From a Dice of 0 nothing can be lost; such a patch counts as crossed.
        threshold = torch.where(dice > 0, dice * tau, absolute) if criterion == "relative" else absolute
        return dice, threshold, dice.isnan()

    def _perturb(
        self,
        problem: Problem,
        eps: torch.Tensor,
        found: BoundaryResult,
        quality: torch.Tensor,
        threshold: torch.Tensor,
        searched: torch.Tensor,
        perturbed: torch.Tensor,
        start: torch.Tensor | None,
    ) -> BoundaryResult:
        """The boundary of the ``searched`` samples, and PGD within its margin ``eps`` on each that is ``perturbed``."""
        settings = self.settings
        multiple_of = 1 if eps.device.type == "cpu" else math.ceil(len(eps) / ACCELERATOR_SIZES)
        if bool(searched.any()):
            found = boundary_search(
                problem,
                eps,
                threshold=threshold,
                clean_quality=quality,
                quality=loss_quality if settings.criterion == "loss" else hard_quality,
                settings=settings.search(delta=self.ledger.delta, multiple_of=multiple_of),
                searched=searched,
                start=start,
            )
        rows = chosen(perturbed, multiple_of)
        if len(rows) == 0:
            return found
        hit = pgd(
            problem.select(rows),
            eps[rows],
            steps=settings.background_steps,
            step_factor=settings.step_factor,
            keep="last",  # costs the gradient passes and nothing else
        )
        assign(found.adversarial, rows, perturbed[rows], hit.adversarial)
        assign(found.distance, rows, perturbed[rows], hit.distance)
        return replace(found, passes=found.passes + hit.passes)

    def _free_step(self, problem: Problem, gradient: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """The perturbation (B, image channels, *S) of one step of the search along the clean ``gradient``.

        It is made from a random point. The scale of the gradient does not matter, so neither does that of a gradient
        scaler. Where it is zero, infinite or NaN, the random point remains.
        """
        random = problem.random(start_radius(eps, self.ledger.delta))
        length = self.settings.step_factor * eps / self.settings.steps
        gradient = problem.through(self.threat.perturbable(gradient), random)
        step, size = gradient_step(random, gradient, alpha=length, eps=eps, norm=self.threat.norm)
        return torch.where(per_row(torch.isfinite(size) & (size > 0), step), step, random)
