"""The forward and input-gradient pass that all white-box attacks share."""

from __future__ import annotations

import torch

from ima_seg.errors import UserError
from ima_seg.losses import dice_ce_loss
from ima_seg.model import autocast, full_resolution
from ima_seg.types import Network, Target, ThreatModel


def check_batch(x: torch.Tensor, eps: torch.Tensor) -> None:
    """Refuse batches and budgets that no attack can work with. Reads shapes and dtypes only, never values."""
    if x.ndim < 3 or not x.is_floating_point():
        raise UserError(f"the batch is {x.dtype} of shape {tuple(x.shape)}; expected floating point (B, C, *S)")
    if eps.shape != x.shape[:1]:
        raise UserError(f"eps has shape {tuple(eps.shape)} for a batch of {x.shape[0]}; expected one value per sample")
    if eps.device != x.device:
        raise UserError(f"eps is on {eps.device}, the batch on {x.device}; move them to one device")


def forward(model: Network, x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Full-resolution logits (B, K, *S) of ``x`` under autocast to ``dtype``."""
    with autocast(dtype, x.device):
        return full_resolution(model(x))


class Perturbed:
    """A batch plus perturbation as a leaf tensor, so that one network pass yields logits and, if asked, a gradient.

    Only the perturbable channels of ``x`` are changed; the gradient covers those alone.
    """

    def __init__(self, model: Network, x: torch.Tensor, threat: ThreatModel, dtype: torch.dtype | None) -> None:
        self.model, self.x, self.threat, self.dtype = model, x, threat, dtype

    def select(self, rows: torch.Tensor) -> Perturbed:
        return Perturbed(self.model, self.x[rows], self.threat, self.dtype)

    def apply(self, delta: torch.Tensor) -> torch.Tensor:
        """``x`` with ``delta`` (B, image channels, *S) added to its perturbable channels; a new tensor."""
        perturbed = self.x.clone()
        self.threat.perturbable(perturbed).add_(delta)
        return perturbed

    @torch.no_grad()
    def logits(self, delta: torch.Tensor) -> torch.Tensor:
        return forward(self.model, self.apply(delta), self.dtype)

    def logits_with_graph(self, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The leaf and its logits, ready for :meth:`gradient`."""
        with torch.enable_grad():
            leaf = self.apply(delta).requires_grad_(True)
            return leaf, forward(self.model, leaf, self.dtype)

    def gradient(self, leaf: torch.Tensor, logits: torch.Tensor, target: Target) -> torch.Tensor:
        """Gradient of the per-sample Dice + CE with respect to the perturbable channels, up to a positive factor."""
        with torch.enable_grad():
            # The factor lifts the per-voxel gradient of a mean over N voxels to order one: float16 would flush it to 0.
            loss = dice_ce_loss(logits, target).sum() * float(logits.flatten(2).shape[2])
            (gradient,) = torch.autograd.grad(loss, leaf)
        return self.threat.perturbable(gradient)
