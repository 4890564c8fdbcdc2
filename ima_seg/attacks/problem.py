"""What is attacked, and what all attacks share: an attack is a function of a problem and a budget."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from ima_seg.attacks.goals import UNTARGETED, Goal
from ima_seg.attacks.network import Precision, frozen, resolve_precision
from ima_seg.errors import UserError
from ima_seg.ops import check_device, check_images, check_mask, draw_seeds, random_start
from ima_seg.types import Network, Target, ThreatModel

#: Budget of each sample, (B,), or one for all; per voxel in network units (l2: the RMS over all voxels, whatever the
#: support).
Eps = torch.Tensor | float

_Options = ParamSpec("_Options")
_Result = TypeVar("_Result")

#: Budgets below count as 0: float32 has no such changes beside values of order 1. Beyond the largest, as below the
#: smallest, sums of squares leave the range of float32.
SMALLEST, LARGEST = 1e-12, 1e12

#: How long attacks run; each is at least 1.
_COUNTS = ("steps", "queries", "rounds", "restarts")


@dataclass(frozen=True, eq=False)
class Problem:
    """A network, a batch, and what may be done to it; built once, for any number of attacks.

    Args:
        network: (B, C, *S) -> logits (B, K, *S), of classifiers (B, K), or a list with the full resolution first. Its
            flags are restored, its gradients and statistics left alone.
        x: batch (B, C, *S), floating point, in network units.
        target: its reference.
        threat: norm and perturbable channels.
        goal: what to climb and how to measure the damage.
        support: bool, broadcastable to the perturbable channels (B, image channels, *S); the perturbation is zero where
            it is False. None: everywhere.
        precision: of the passes, see :func:`ima_seg.attacks.network.resolve_precision`.
        generator: source of everything random, on the device of ``x``.

    Raises:
        UserError: a batch, reference, support or precision that does not fit.
    """

    network: Network
    x: torch.Tensor
    target: Target
    threat: ThreatModel = field(default_factory=ThreatModel)
    goal: Goal = UNTARGETED
    support: torch.Tensor | None = None
    precision: Precision = "auto"
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        x, reference = self.x, self.target.reference
        check_images(**{"the batch": x})
        whole, voxels = self.target.whole_image, reference.shape[2]
        if (len(reference), voxels) != (len(x), 1 if whole else x[0, 0].numel()):
            raise UserError(
                f"the reference is of {len(reference)} samples of {'classes' if whole else f'{voxels} voxels'}, the "
                f"batch {tuple(x.shape)}; they must agree"
            )
        check_device(x, **{"the reference": reference})
        check_mask(self.image, self.support, "support")
        _ = self.dtype  # refuses a precision that does not exist

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """The autocast dtype of the passes."""
        return resolve_precision(self.precision, self.x.device)

    @property
    def image(self) -> torch.Tensor:
        """The channels of ``x`` that may be perturbed, (B, image channels, *S), a view."""
        return self.threat.perturbable(self.x)

    def select(self, rows: torch.Tensor | slice) -> Problem:
        """The same for some of the samples."""
        support = self.support if self.support is None or len(self.support) == 1 else self.support[rows]
        return replace(self, x=self.x[rows], target=self.target[rows], support=support)

    def budgets(self, eps: Eps) -> torch.Tensor:
        """``eps`` for each sample, (B,), 0 where it is below :data:`SMALLEST`; the one place that reads values.

        Raises:
            UserError: budgets that do not fit the batch, are negative, NaN or above :data:`LARGEST`.
        """
        x = self.x
        if not isinstance(eps, torch.Tensor):
            eps = torch.tensor([float(eps)] * len(x), dtype=torch.float64).float().to(x.device)
        if eps.shape != x.shape[:1]:
            raise UserError(f"eps has shape {tuple(eps.shape)} for a batch of {len(x)}; expected one value per sample")
        check_device(x, eps=eps)
        if not eps.is_floating_point():
            raise UserError(f"eps is {eps.dtype}; expected floating point, per voxel in network units")
        if not bool(((eps >= 0) & (eps <= LARGEST)).all()):
            raise UserError(f"eps is {eps.tolist()}; a budget is 0 or positive, and at most {LARGEST:g}")
        return torch.where(eps < SMALLEST, 0.0, eps)

    def apply(self, delta: torch.Tensor) -> torch.Tensor:
        """``x`` with ``delta`` (B, image channels, *S) added to its perturbable channels, within bounds; new."""
        image = self.image
        if image.shape == self.x.shape and delta.dtype == image.dtype:
            return self.threat.within(image, image + delta)
        perturbed = self.x.clone()
        self.threat.perturbable(perturbed).copy_(self.threat.within(image, (image + delta).to(image.dtype)))
        return perturbed

    def difference(self, perturbed: torch.Tensor) -> torch.Tensor:
        """The perturbation (B, image channels, *S) that makes ``perturbed`` (B, C, *S) of ``x``; at least float32."""
        dtype = torch.promote_types(self.x.dtype, torch.float32)
        return self.threat.perturbable(perturbed).to(dtype) - self.image.to(dtype)

    def supported(self, delta: torch.Tensor) -> torch.Tensor:
        """``delta`` (B, image channels, *S), zero outside the support."""
        return delta if self.support is None else torch.where(self.support, delta, 0.0)

    def through(self, gradient: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """What of a gradient at ``x + delta`` reaches ``delta``; zero outside the support and beyond bounds."""
        gradient = self.supported(gradient)
        if not self.threat.bounded:
            return gradient
        wanted = self.image + delta
        return torch.where(self.threat.within(self.image, wanted) == wanted, gradient, 0.0)

    def zero(self) -> torch.Tensor:
        """The perturbation of the clean batch (B, image channels, *S).

        At least float32: in the bfloat16 of a batch the steps of an attack would be lost to rounding.
        """
        image = self.image
        return torch.zeros_like(image, dtype=torch.promote_types(image.dtype, torch.float32))

    def random(self, radius: torch.Tensor) -> torch.Tensor:
        """A random perturbation within the support, of the size it would have without one; at most ``radius`` (B,)."""
        seeds = draw_seeds(len(radius), radius.device, self.generator)
        return random_start(self.zero(), radius.float(), self.threat.norm, seeds, self.support)


def attack(
    body: Callable[Concatenate[Problem, torch.Tensor, _Options], _Result],
) -> Callable[Concatenate[Problem, Eps, _Options], _Result]:
    """Decorator of all attacks: it checks budgets and lengths, and freezes the network while the attack runs.

    Args:
        body: takes the problem and its budgets (B,), further options by keyword.
    """

    @functools.wraps(body)
    def run(problem: Problem, eps: Eps, /, *args: _Options.args, **options: _Options.kwargs) -> _Result:
        if not isinstance(problem, Problem):
            raise UserError(
                f"an attack takes a Problem and a budget, this is {type(problem).__name__}; write "
                f"{body.__name__}(Problem(network, x, target, threat), eps, ...)"
            )
        given: dict[str, Any] = options
        if any(given.get(name, 1) < 1 for name in _COUNTS):
            counts = ", ".join(f"{name} is {given[name]}" for name in _COUNTS if name in given)
            raise UserError(f"{counts}; an attack makes at least one of each")
        budgets = problem.budgets(eps)
        with torch.no_grad(), frozen(problem.network, problem.dtype):
            return body(problem, budgets, *args, **options)

    return run
