"""The baseline that whole-volume attacks are compared with: each patch attacked for itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ima_seg.attacks.base import AttackResult, lost_dice
from ima_seg.attacks.network import Precision, full_resolution
from ima_seg.attacks.pgd import pgd
from ima_seg.attacks.tiling import Tiling
from ima_seg.ops import perturbation_size, project
from ima_seg.types import Labels, Network, PassCount, Target, ThreatModel


@torch.no_grad()
def patch_pgd(
    model: Network,
    x: torch.Tensor,
    target: Target,
    *,
    window: Tiling,
    normalise: torch.nn.Module,
    eps: torch.Tensor,
    threat: ThreatModel,
    steps: int,
    restarts: int = 1,
    support: torch.Tensor | None = None,
    precision: Precision = "auto",
    generator: torch.Generator | None = None,
) -> AttackResult:
    """PGD on each patch of a grid without overlap (but at the edges), put together.

    Neither blending, mirroring nor the other folds take part in the gradient, which is what attacking a network patch
    by patch amounts to. The result is projected onto the budget of the whole.

    Args:
        model: (1, C + extra, *S) -> logits of the whole, for the damage that is returned.
        x: batch (B, C + extra, *S), of as many spatial axes as the patch.
        target: its reference.
        window: whose first network and patch size are used.
        normalise: patch in the layout of ``x`` -> input of the network.
        eps: budget (B,).
        threat: norm and perturbable channels.
        steps: gradient steps.
        restarts: of each patch.
        support: where a perturbation may be.
        precision: of the passes, see :func:`ima_seg.attacks.network.resolve_precision`.
        generator: source of the random starts.
    """
    network = window.networks[0]
    channels = threat.perturbable(x).shape[1]
    grid = Tiling([network], patch_size=window.patch_size, step_size=1.0, tile_batch=window.tile_batch)
    padded, inside = grid._pad(x)
    # What is padded is ignored.
    labels = Labels(target.labels.outputs, target.labels.regions, ignore_label=-1)
    known = torch.ones_like(target.reference[:, :1], dtype=torch.bool) if target.known is None else target.known
    framed = Target(target.reference, known if labels.regions else None, labels).map(
        lambda part: grid._pad(part.view(*part.shape[:2], *x.shape[2:]))[0]
    )
    delta = torch.zeros_like(padded[:, :channels])
    passes = PassCount()
    for batch in grid._batches(padded.shape):
        tiles = torch.stack([padded[index] for index in batch])
        budgets = torch.stack([eps[index[0]] for index in batch])
        hit = pgd(
            lambda tile: full_resolution(network(normalise(tile))),
            tiles,
            framed.map(partial(_stack, batch)),
            eps=budgets,
            threat=threat,
            steps=steps,
            restarts=restarts,
            precision=precision,
            generator=generator,
        )
        passes += hit.passes
        for index, found in zip(batch, hit.adversarial - tiles, strict=True):
            delta[index] = found[:channels]
    whole = delta[(slice(None), slice(None), *inside)]
    if support is not None:
        whole = whole * support
    whole = project(whole.contiguous(), eps, threat.norm)
    adversarial = x.clone()
    adversarial[:, :channels] += whole
    damage = lost_dice(full_resolution(model(adversarial)), target)
    return AttackResult(
        adversarial=adversarial,
        distance=perturbation_size(whole, threat.norm),
        damage=damage,
        zero_gradient=torch.zeros_like(damage),
        trace=damage[None],
        # passes over tiles -> over samples
        passes=PassCount(forwards=len(x), gradients=round(passes.gradients * len(x) / grid.tiles(x.shape))),
    )


def _stack(indices: Sequence[Any], volume: torch.Tensor) -> torch.Tensor:
    """The parts of ``volume`` (B, C, *S) at ``indices``, (len(indices), C, N)."""
    return torch.stack([volume[index] for index in indices]).flatten(2)
