"""The network passes of an attack: logits and, if asked, how the loss changes."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Protocol

import torch

from ima_seg.attacks.network import (
    Precision,
    autocast,
    frozen,
    full_precision,
    full_resolution,
    resolve_precision,
)
from ima_seg.attacks.problem import Problem
from ima_seg.errors import UserError
from ima_seg.ops import per_row
from ima_seg.types import Network, PassCount


def forward(network: Network, x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Full-resolution logits (B, K, *S) of ``x`` under autocast to ``dtype``."""
    with autocast(dtype, x.device):
        return full_resolution(network(x))


def as_attacked(network: Network, x: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Full-resolution logits of ``x`` as attacks see them: in evaluation mode and ``precision``, without a graph."""
    dtype = resolve_precision(precision, x.device)
    with frozen(network, dtype), torch.no_grad():
        return forward(network, x, dtype)


def all_finite(logits: torch.Tensor) -> torch.Tensor:
    """(B,) bool, whether all logits (B, K, *S) or (B, K) of a sample are finite."""
    # The largest, not the sum, which finite logits can make infinite.
    return torch.isfinite(torch.linalg.vector_norm(logits, torch.inf, dim=tuple(range(1, logits.ndim))))


def predicted(network: Network, x: torch.Tensor, who: str) -> torch.Tensor:
    """The logits (B, K, *S) of ``x`` that are scored: in full precision, and finite.

    Raises:
        UserError: they are not; the message begins with ``who``.
    """
    with full_precision():
        logits: torch.Tensor = network(x)
    if not bool(all_finite(logits).all()):
        raise UserError(
            f"{who} gives outputs that are NaN or infinite, which predict nothing; use another checkpoint or, where "
            "clean images are predicted, smaller eps"
        )
    return logits


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


def begin(problem: Problem, delta: torch.Tensor, scale: torch.Tensor, progress: float | torch.Tensor) -> Pass:
    """The pass at ``x + delta``; its gradient is that of ``scale`` (B,) times the loss."""
    with torch.enable_grad():
        leaf = problem.apply(delta).requires_grad_(True)
        output = [forward(problem.network, leaf, problem.dtype)]

    def compute() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            # Captured passes hold the progress in a tensor.
            loss = problem.goal.loss(output.pop(), problem.target, progress)  # type: ignore[arg-type]
            (gradient,) = torch.autograd.grad((loss * scale).sum(), leaf)
        return loss.detach(), problem.through(problem.threat.perturbable(gradient), delta)

    return Pass(output[0].detach(), compute)


class Replays(Protocol):
    """What can make passes in another way, :class:`ima_seg.attacks.graphs.GraphedPasses`."""

    def run(self, problem: Problem, delta: torch.Tensor, scale: torch.Tensor, progress: float) -> Pass | None:
        """As :func:`begin`; None where it cannot."""


#: What makes the passes of the attacks that run here, if not :func:`begin`.
replays: ContextVar[Replays | None] = ContextVar("ima_seg_replays", default=None)


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


class Passes:
    """The passes of one attack on a problem.

    Attributes:
        problem: the problem.
        scale: of its loss.
        made: how many passes there were, over samples.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.made = problem, PassCount()
        # The loss of a classifier is no mean over voxels.
        voxels = 1 if problem.target.whole_image else problem.x[0, 0].numel()
        narrow = torch.float16 in (problem.dtype, problem.x.dtype)
        self.scale = LossScale(torch.full((len(problem),), float(voxels), device=problem.x.device), voxels, narrow)

    def select(self, rows: torch.Tensor) -> None:
        """Go on with some of the samples."""
        self.problem, self.scale = self.problem.select(rows), self.scale.select(rows)

    @torch.no_grad()
    def logits(self, delta: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, *S) of ``x + delta``."""
        self.made += PassCount(forwards=len(delta))
        return forward(self.problem.network, self.problem.apply(delta), self.problem.dtype)

    def at(self, delta: torch.Tensor, progress: float = 0.0) -> Pass:
        """A pass at ``x + delta`` after the share ``progress`` of the steps, replayed where that is asked for."""
        problem, scale, others = self.problem, self.scale.scale, replays.get()
        found = None if others is None else others.run(problem, delta, scale, progress)
        here = begin(problem, delta, scale, progress) if found is None else found
        self.made += PassCount(forwards=len(delta))

        def compute() -> tuple[torch.Tensor, torch.Tensor]:
            self.made += PassCount(forwards=-len(delta), gradients=len(delta))
            loss, gradient = here.loss_and_gradient()
            return loss, self.scale.checked(gradient)

        return Pass(here.logits, compute)
