"""What all white-box attacks share: the pass that yields logits and input gradient, and the best point so far."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ima_seg.attacks.base import UNTARGETED, AttackResult, Goal, Loss
from ima_seg.attacks.graphs import active_graphs
from ima_seg.attacks.network import Precision, autocast, full_resolution, resolve_precision
from ima_seg.errors import UserError
from ima_seg.ops import draw_seeds, per_row, perturbation_size, project, random_start
from ima_seg.types import Network, PassCount, Target, ThreatModel


def check_batch(x: torch.Tensor, eps: torch.Tensor, target: Target) -> None:
    """Refuse batches, budgets and references that no attack can work with; the one time that it reads values."""
    if x.ndim < 3 or x.numel() == 0 or not x.is_floating_point():
        raise UserError(
            f"the batch is {x.dtype} of shape {tuple(x.shape)}; expected floating point (B, C, *S), not empty"
        )
    if eps.shape != x.shape[:1]:
        raise UserError(f"eps has shape {tuple(eps.shape)} for a batch of {x.shape[0]}; expected one value per sample")
    if eps.device != x.device:
        raise UserError(f"eps is on {eps.device}, the batch on {x.device}; move them to one device")
    if not eps.is_floating_point():
        raise UserError(f"eps is {eps.dtype}; expected floating point, per voxel in network units")
    batch, _, voxels = target.reference.shape
    if (batch, voxels) != (len(x), 1 if target.whole_image else x[0, 0].numel()):
        what = "classes" if target.whole_image else f"{voxels} voxels"
        raise UserError(f"the reference is of {batch} samples of {what}, the batch {tuple(x.shape)}; they must agree")
    if target.reference.device != x.device:
        place = target.reference.device
        raise UserError(f"the reference is on {place}, the batch on {x.device}; move them to one device")
    if not bool(((eps >= 0) & (eps < torch.inf)).all()):
        raise UserError(f"eps is {eps.tolist()}; a budget is 0 or positive, and finite")


def check_counts(steps: int, restarts: int) -> None:
    """Refuse attacks without a step."""
    if steps < 1 or restarts < 1:
        raise UserError(f"steps is {steps}, restarts is {restarts}; an attack makes at least one of each")


def forward(model: Network, x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Full-resolution logits (B, K, *S) of ``x`` under autocast to ``dtype``."""
    with autocast(dtype, x.device):
        return full_resolution(model(x))


def all_finite(logits: torch.Tensor) -> torch.Tensor:
    """(B,) bool, whether all logits (B, K, *S) or (B, K) of a sample are finite."""
    return torch.isfinite(logits.flatten(1).sum(1, dtype=torch.float32))


class Perturbed:
    """A batch plus perturbation as a leaf tensor, so that one network pass yields logits and, if asked, a gradient.

    Only the perturbable channels of ``x`` are changed, and of those only what lies in ``support``; the gradient covers
    those channels alone and is zero outside the support.

    Args:
        model: network (B, C, *S) -> logits.
        x: batch (B, C, *S).
        threat: norm and perturbable channels.
        precision: of the passes, see :func:`ima_seg.attacks.network.resolve_precision`.
        loss: what the gradient climbs.
        support: bool, broadcastable to the perturbable channels; None for everywhere.
    """

    def __init__(
        self,
        model: Network,
        x: torch.Tensor,
        threat: ThreatModel,
        precision: Precision = "auto",
        loss: Loss = UNTARGETED.loss,
        support: torch.Tensor | None = None,
    ) -> None:
        self.model, self.x, self.threat, self.loss, self.support = model, x, threat, loss, support
        self.precision: Precision = precision
        self.dtype = resolve_precision(precision, x.device)
        voxels = x[0, 0].numel()
        narrow = self.dtype == torch.float16 or x.dtype == torch.float16
        self.scale = LossScale(torch.full(x.shape[:1], float(voxels), device=x.device), voxels, narrow)
        if support is not None:
            wanted = tuple(threat.perturbable(x).shape)
            fits = support.ndim == x.ndim and all(a in (1, b) for a, b in zip(support.shape, wanted, strict=True))
            if support.dtype != torch.bool or not fits:
                shape = tuple(support.shape)
                raise UserError(
                    f"support is {support.dtype} of shape {shape}; expected bool that broadcasts to {wanted}"
                )

    def select(self, rows: torch.Tensor) -> Perturbed:
        """The same for some of the samples."""
        support = self.support if self.support is None or len(self.support) == 1 else self.support[rows]
        chosen = Perturbed(self.model, self.x[rows], self.threat, self.precision, self.loss, support)
        chosen.scale = self.scale.select(rows)
        return chosen

    def apply(self, delta: torch.Tensor) -> torch.Tensor:
        """``x`` with ``delta`` (B, image channels, *S) added to its perturbable channels; a new tensor."""
        image = self.threat.perturbable(self.x)
        if image.shape == self.x.shape and delta.dtype == image.dtype:
            return image + delta
        perturbed = self.x.clone()
        self.threat.perturbable(perturbed).add_(delta)
        return perturbed

    def supported(self, delta: torch.Tensor) -> torch.Tensor:
        """``delta`` (B, image channels, *S), zero outside the support."""
        return delta if self.support is None else torch.where(self.support, delta, 0.0)

    def zero(self) -> torch.Tensor:
        """The perturbation of the clean batch (B, image channels, *S).

        At least float32: in the bfloat16 of a batch the steps of an attack would be lost to rounding.
        """
        image = self.threat.perturbable(self.x)
        return torch.zeros_like(image, dtype=torch.promote_types(image.dtype, torch.float32))

    def random(self, radius: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """A random perturbation within the support, of the size it would have without one; at most ``radius`` (B,)."""
        seeds = draw_seeds(len(radius), radius.device, generator)
        return random_start(self.zero(), radius.float(), self.threat.norm, seeds, self.support)

    @torch.no_grad()
    def logits(self, delta: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, *S) of ``x + delta``."""
        return forward(self.model, self.apply(delta), self.dtype)

    def at(self, delta: torch.Tensor, target: Target, progress: float = 0.0) -> Pass:
        """A network pass at ``x + delta``, replayed from a CUDA graph where that is asked for and possible."""
        scale = self.scale.scale
        if target.whole_image:  # whose loss is no mean over voxels
            scale = scale / self.x[0, 0].numel()
        graphs = active_graphs()
        found = graphs.run(self, delta, target, scale, progress) if graphs is not None else None
        if found is None:
            found = self.begin(delta, target, scale, progress)
        here = found

        def compute() -> tuple[torch.Tensor, torch.Tensor]:
            loss, gradient = here.loss_and_gradient()
            return loss, self.scale.checked(gradient)

        return Pass(here.logits, compute)

    def begin(self, delta: torch.Tensor, target: Target, scale: torch.Tensor, progress: float | torch.Tensor) -> Pass:
        """The pass itself; its gradient is that of ``scale`` (B,) times the loss."""
        with torch.enable_grad():
            leaf = self.apply(delta).requires_grad_(True)
            output = [forward(self.model, leaf, self.dtype)]

        def compute() -> tuple[torch.Tensor, torch.Tensor]:
            with torch.enable_grad():
                loss = self.loss(output.pop(), target, progress)  # type: ignore[arg-type]  # graphs hold it in a tensor
                (gradient,) = torch.autograd.grad((loss * scale).sum(), leaf)
            return loss.detach(), self.supported(self.threat.perturbable(gradient))

        return Pass(output[0].detach(), compute)


class Pass:
    """A network pass at one point: what the network says there, and on demand how its loss changes.

    Attributes:
        logits: (B, K, *S), without graph; until the gradient is asked for, which needs the memory.
    """

    def __init__(self, logits: torch.Tensor, compute: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.logits, self._compute = logits, compute

    def loss_and_gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss (B,), and its gradient with respect to the perturbable channels (B, image channels, *S).

        The gradient is that of a sample's loss up to a positive factor. To be called once.
        """
        del self.logits
        return self._compute()

    def gradient(self) -> torch.Tensor:
        """The gradient of :meth:`loss_and_gradient` alone."""
        return self.loss_and_gradient()[1]


class LossScale:
    """The factor per sample on the loss, without which small gradients vanish in float16.

    It begins at the number of voxels, for the loss is a mean over them, and in float16 follows the gradients: up where
    they come near the smallest numbers, down where they leave the range. A sample whose gradient left the range at a
    scale that can still be lowered has a gradient of zero in that step, instead of one that is not finite.
    """

    #: Gradients are kept above; factor of a change; least scale, and greatest in units of the number of voxels.
    SMALL, CHANGE, LEAST, MOST = 2.0**-8, 2.0**6, 2.0**-15, 2.0**15

    def __init__(self, scale: torch.Tensor, voxels: int, follows: bool) -> None:
        self.scale, self._voxels, self._follows = scale, voxels, follows
        #: (B,) bool, whose last gradient left the range and was taken as zero.
        self.skipped = torch.zeros_like(scale, dtype=torch.bool)

    def select(self, rows: torch.Tensor) -> LossScale:
        """The same for some of the samples."""
        return LossScale(self.scale[rows], self._voxels, self._follows)

    def checked(self, gradient: torch.Tensor) -> torch.Tensor:
        """``gradient`` (B, C, *S) as it may be used; the scale moves for the next one."""
        if not self._follows:
            return gradient
        largest = gradient.flatten(1).abs().amax(1)
        left = ~torch.isfinite(largest)
        lowered = (self.scale / self.CHANGE).clamp_min(self.LEAST)
        self.skipped = left & (lowered < self.scale)
        gradient = torch.where(per_row(self.skipped, gradient), 0.0, gradient)
        raised = (self.scale * self.CHANGE).clamp_max(self.MOST * self._voxels)
        self.scale = torch.where(left, lowered, torch.where(largest < self.SMALL, raised, self.scale))
        return gradient


class Best:
    """The point of most damage among those visited, per sample, over all restarts. Never waits for the device.

    Of points that do equal damage the last one counts: it was climbed further. Points with NaN or infinite logits do
    not count.

    Args:
        batch: the batch under attack.
        target: its reference.
        goal: measures the damage.
        eps: budget (B,); points must be within it when they are visited.
        steps: of one restart; the trace holds one more.
    """

    def __init__(self, batch: Perturbed, target: Target, goal: Goal, eps: torch.Tensor, steps: int) -> None:
        self.batch, self.target, self.goal, self.eps = batch, target, goal, eps
        self.delta = batch.zero()
        nothing = torch.full(eps.shape, -torch.inf, device=eps.device)
        self.damage, self._clean, self._running = nothing, nothing, nothing
        self.trace = nothing.repeat(steps + 1, 1)
        self._gradients = 0
        self._zero = torch.zeros_like(nothing)

    def visit_clean(self) -> int:
        """Visit the clean batch for attacks that start elsewhere; returns the forwards made."""
        self.visit(self.delta, self.batch.logits(self.delta), 0)
        self._clean = self._running
        return len(self.delta)

    def begin_restart(self) -> None:
        """Start the trace over, from the clean point where that has been visited."""
        self._running = self._clean

    def visit(self, delta: torch.Tensor, logits: torch.Tensor, step: int) -> torch.Tensor:
        """Note the logits (B, K, *S) of ``x + delta``, the point after ``step`` steps of this restart.

        Returns:
            (B,) bool, whether all logits are finite.
        """
        logits = logits.detach()
        sane = all_finite(logits)
        damage = torch.where(sane, self.goal.damage(logits, self.target).float(), -torch.inf)
        better = (damage >= self.damage) & (damage > -torch.inf)
        self.delta = torch.where(per_row(better, delta), delta, self.delta)
        self.damage = torch.where(better, damage, self.damage)
        self._running = torch.fmax(self._running, damage)
        self.carry(step)
        return sane

    def carry(self, step: int) -> None:
        """Note that ``step`` steps brought nothing new."""
        self.trace[step] = torch.fmax(self.trace[step], self._running)

    def count(self, length: torch.Tensor) -> None:
        """Count a gradient pass whose gradients are of size ``length`` (B,), and those that are exactly zero."""
        self._gradients += 1
        self._zero = self._zero + ((length == 0) & ~self.batch.scale.skipped)

    def result(self, forwards: int) -> AttackResult:
        """The best point, projected and measured once more; ``forwards`` over all samples were made without gradient.

        The damage of a sample whose logits never were finite is NaN.
        """
        return finish(
            self.batch,
            project(self.delta, self.eps, self.batch.threat.norm),
            damage=torch.where(torch.isinf(self.damage), torch.nan, self.damage),
            zero_gradient=self._zero / max(self._gradients, 1),
            trace=torch.where(torch.isinf(self.trace), torch.nan, self.trace),
            passes=PassCount(forwards=forwards, gradients=self._gradients * len(self.delta)),
        )


def finish(
    batch: Perturbed,
    delta: torch.Tensor,
    *,
    damage: torch.Tensor,
    zero_gradient: torch.Tensor,
    trace: torch.Tensor,
    passes: PassCount,
) -> AttackResult:
    """The result for ``delta`` (B, image channels, *S), its size measured on the batch that is handed out."""
    adversarial = batch.apply(delta)
    perturbed, clean = batch.threat.perturbable(adversarial), batch.threat.perturbable(batch.x)
    distance = perturbation_size(perturbed.to(delta.dtype) - clean.to(delta.dtype), batch.threat.norm)
    return AttackResult(adversarial, distance, damage, zero_gradient, trace, passes)
