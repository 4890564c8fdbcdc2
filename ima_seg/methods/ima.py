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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ima_seg.attacks import BoundaryResult, GraphedPasses, Problem, boundary_search, pgd
from ima_seg.attacks.boundary import start_radius
from ima_seg.attacks.network import frozen, full_resolution, inner_module, resolve_precision
from ima_seg.attacks.passes import forward as passed
from ima_seg.attacks.quality import class_quality, hard_quality, loss_quality
from ima_seg.attacks.rows import assign, chosen
from ima_seg.errors import UserError
from ima_seg.methods.ledger import EpochSummary, MarginLedger
from ima_seg.methods.settings import IMASettings
from ima_seg.ops import draw_seeds, gradient_step, hard_dice, per_row, random_start
from ima_seg.types import Classes, Labels, Network, PassCount, Target, ThreatModel

#: On accelerators the working batch of the search shrinks in at most this many sizes.
ACCELERATOR_SIZES = 8


def _backward(loss: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def _trained_on(output: Any, rows: torch.Tensor) -> Any:
    """A network's ``output`` whose gradient comes from the ``rows`` (B,) bool alone; all its values stay."""
    if isinstance(output, (list, tuple)):
        return type(output)(_trained_on(head, rows) for head in output)
    return torch.where(per_row(rows, output), output, output.detach())


@dataclass(frozen=True)
class StepReport:
    """What one step did. Tensors stay on their device, detached.

    Attributes:
        loss: (1 - beta) * clean + beta * adversarial, 0-dim.
        clean_loss, adversarial_loss: 0-dim; equal where nothing was attacked. The adversarial one is that of the whole
            batch, which includes a classifier's wrong images, though they have no part in its gradient.
        adversarial: the perturbed batch (B, C, *S), or None where nothing was attacked.
        searched: (B,) bool, patches whose boundary was searched: with foreground, not below the criterion's threshold
            without perturbation, and of a case that does not rest.
        resting: (B,) bool, patches left out of the search because the margin of their case is steady.
        crossed: (B,) bool.
        distance: (B,) size of the perturbation, per voxel in network units.
        background: (B,) bool, patches without foreground; none for classifiers.
        below: (B,) bool, patches that have crossed without perturbation, images that are classified wrongly.
        nonfinite: (B,) bool, patches left out of the margins for a NaN or infinite gradient.
        stalled: (B,) bool, patches whose gradient was exactly zero at some step.
        passes: network passes that the perturbations took, without the two training passes and a classifier's check.
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

    One step computes ``(1 - beta) * loss(clean) + beta * loss(adversarial)``; of a classifier only the images that are
    right without perturbation count in the second term, and the loss must be a mean over images. The gradient is
    accumulated in two backward passes, the clean one before the search begins: the clean activations are then gone when
    the search needs room, and the peak memory is that of a standard step.
    """

    def __init__(
        self,
        settings: IMASettings,
        *,
        labels: Labels | Classes,
        ledger: MarginLedger,
        image_channels: int | None = None,
    ) -> None:
        if isinstance(labels, Classes):
            settings.check_classes()
        self.settings, self.labels, self.ledger = settings, labels, ledger
        self.threat = ThreatModel(settings.norm, image_channels)
        self._graphs = GraphedPasses() if settings.cuda_graphs == "on" else None

    @classmethod
    def from_settings(
        cls,
        settings: IMASettings,
        *,
        labels: Labels | Classes,
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
        victim: Network | None = None,
        generator: torch.Generator | None = None,
    ) -> StepReport:
        """Accumulate the gradient of one IMA step in ``p.grad`` and note the visits in the ledger.

        Args:
            model: network (B, C, *S) -> logits (B, K, *S), or a list with the full resolution first; also wrapped in
                DistributedDataParallel or torch.compile. A classifier yields logits (B, K).
            x: batch (B, C, *S), floating point, finite, in network units.
            y: reference at full resolution, (B, 1, *S) or (B, *S) labels, or regions (B, K[+1], *S). Of a classifier
                classes (B,) or (B, 1), or labels (B, K) of 0 and 1.
            case_ids: B ids; repeats are visits of their own.
            loss: training loss of the network's whole output, for this batch.
            backward: how to backpropagate a loss (a gradient scaler scales here).
            forward: how to call the network for the two training passes (autocast goes here); default ``model(x)``.
            victim: what the search attacks where that is not the network itself: the network as it is used, with its
                tiling or further inputs.
            generator: source of the random starts.

        The caller clears gradients before and steps the optimiser afterwards, once.
        """
        if len(case_ids) != len(x):
            raise UserError(f"{len(case_ids)} case ids for a batch of {len(x)}; every sample needs the id of its case")
        forward = forward or (lambda network, batch: network(batch))
        beta, network = self.settings.beta, inner_module(model) if victim is None else victim
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
            clean_logits = full_resolution(output).detach()
            if target.whole_image and model.training and beta > 0:
                clean_logits = self._searched_logits(network, x)
            quality, threshold, background = self._criterion(clean_logits, target)
            below = ~background & (quality < threshold)
            resting = ~background & ~below & self.ledger.resting(case_ids, x.device)
            searched = ~background & ~below & ~resting
            perturbed = resting | background if self.settings.background_steps else resting
            attacked = searched | perturbed
            attack_any = beta > 0 and (distributed or bool(attacked.any()))
            del output, clean_logits
            backward(clean_loss * (1 - beta) if attack_any or target.whole_image else clean_loss)
        clean_loss = clean_loss.detach()
        if not attack_any:
            return self._unattacked(clean_loss, x, searched, resting, background, below)

        eps = self.ledger.get(case_ids, x.device)
        with contextlib.nullcontext() if self._graphs is None else self._graphs:
            found = self._perturb(
                network, x, target, eps, quality, threshold, clean.grad, searched, perturbed, generator
            )
        self.ledger.record(case_ids, crossed=found.crossed, distance=found.distance, counts=searched & found.finite)

        output = forward(model, found.adversarial)
        adversarial_loss = loss(_trained_on(output, attacked) if target.whole_image else output)
        backward(adversarial_loss * beta)
        adversarial_loss = adversarial_loss.detach()
        return StepReport(
            loss=(1 - beta) * clean_loss + beta * adversarial_loss,
            clean_loss=clean_loss,
            adversarial_loss=adversarial_loss,
            adversarial=found.adversarial,
            searched=searched,
            resting=resting,
            crossed=found.crossed,
            distance=found.distance,
            background=background,
            below=below,
            nonfinite=searched & ~found.finite,
            stalled=found.stalled,
            passes=found.passes,
        )

    def end_epoch(self) -> EpochSummary:
        """Move the margins; a collective call when ``torch.distributed`` is initialised."""
        return self.ledger.step()

    def _searched_logits(self, network: Network, x: torch.Tensor) -> torch.Tensor:
        """Logits of the clean batch as the search computes them.

        Classifiers have batch norm and dropout as a rule; what is right in training may be wrong in evaluation mode, in
        which the search would find a boundary at no distance.
        """
        dtype = resolve_precision(self.settings.precision, x.device)
        with frozen(network, dtype), torch.no_grad():
            return passed(network, x, dtype)

    def _criterion(self, logits: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quality of the clean samples, the threshold that they must not fall below, and which have no foreground.

        (B,) all.

        Args:
            logits: full-resolution logits (B, K, *S), or (B, K), of the clean batch.
            target: its reference.
        """
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
        network: Network,
        x: torch.Tensor,
        target: Target,
        eps: torch.Tensor,
        quality: torch.Tensor,
        threshold: torch.Tensor,
        clean_gradient: torch.Tensor | None,
        searched: torch.Tensor,
        perturbed: torch.Tensor,
        generator: torch.Generator | None,
    ) -> BoundaryResult:
        """The boundary of the ``searched`` samples, and PGD within its margin ``eps`` on each that is ``perturbed``."""
        settings = self.settings
        nothing = torch.zeros_like(searched)
        found = BoundaryResult(
            adversarial=x.detach().clone(), crossed=nothing, finite=nothing, distance=torch.zeros_like(eps),
            stalled=nothing, passes=PassCount(),
        )  # fmt: skip
        start = None
        if clean_gradient is not None:
            start = self._free_step(x, clean_gradient, settings.step_factor * eps / settings.steps, eps, generator)
        multiple_of = 1 if x.device.type == "cpu" else math.ceil(len(x) / ACCELERATOR_SIZES)
        problem = Problem(network, x, target, self.threat, precision=settings.precision, generator=generator)
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
            steps=max(settings.background_steps, 1),
            step_factor=settings.step_factor,
            keep="last",  # costs the gradient passes and nothing else
        )
        assign(found.adversarial, rows, perturbed[rows], hit.adversarial)
        assign(found.distance, rows, perturbed[rows], hit.distance)
        return replace(found, passes=found.passes + hit.passes)

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
