"""The baseline that whole-volume attacks are compared with: each patch attacked for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ima_seg.attacks import AttackResult, Problem, pgd
from ima_seg.attacks.network import full_resolution
from ima_seg.attacks.problem import attack
from ima_seg.attacks.result import Best
from ima_seg.attacks.tiling import Tiling
from ima_seg.ops import project
from ima_seg.types import Labels, PassCount, Target


@attack
def patch_pgd(
    problem: Problem,
    eps: torch.Tensor,
    *,
    window: Tiling,
    normalise: torch.nn.Module,
    steps: int,
    restarts: int = 1,
) -> AttackResult:
    """PGD on each patch of a grid without overlap (but at the edges), put together.

    Neither blending, mirroring nor the other folds take part in the gradient, which is what attacking a network patch
    by patch amounts to. The result is projected onto the budget of the whole.

    Args:
        problem: its network takes the whole, for the damage that is returned; its batch has as many spatial axes as the
            patch.
        eps: budget (B,).
        window: whose first network and patch size are used.
        normalise: patch in the layout of the batch -> input of the network.
        steps: gradient steps.
        restarts: of each patch.
    """
    network, x, target = window.networks[0], problem.x, problem.target
    grid = Tiling([network], patch_size=window.patch_size, step_size=1.0, tile_batch=window.tile_batch)
    padded, inside = grid._pad(x)
    # What is padded is ignored.
    labels = Labels(target.labels.outputs, target.labels.regions, ignore_label=-1)
    known = torch.ones_like(target.reference[:, :1], dtype=torch.bool) if target.known is None else target.known
    framed = Target(target.reference, known if labels.regions else None, labels).map(
        lambda part: grid._pad(part.view(*part.shape[:2], *x.shape[2:]))[0]
    )
    delta = torch.zeros_like(problem.threat.perturbable(padded))
    passes = PassCount()
    for batch in grid._batches(padded.shape):
        tiles = replace(
            problem,
            network=lambda tile: full_resolution(network(normalise(tile))),
            x=torch.stack([padded[index] for index in batch]),
            target=framed.map(partial(_stack, batch)),
            support=None,
        )
        budgets = torch.stack([eps[index[0]] for index in batch])
        hit = pgd(tiles, budgets, steps=steps, restarts=restarts)
        passes += hit.passes
        for index, found in zip(batch, tiles.difference(hit.adversarial), strict=True):
            delta[index] = found
    best = Best(problem, eps, 0)
    whole = problem.supported(delta[(slice(None), slice(None), *inside)])
    best.look(project(whole.contiguous(), eps, problem.threat.norm), 0)
    # Passes over tiles -> over samples.
    gradients = round(passes.gradients * len(x) / grid.tiles(x.shape))
    return replace(best.result(), passes=PassCount(forwards=len(x), gradients=gradients))


def _stack(indices: Sequence[Any], volume: torch.Tensor) -> torch.Tensor:
    """The parts of ``volume`` (B, C, *S) at ``indices``, (len(indices), C, N)."""
    return torch.stack([volume[index] for index in indices]).flatten(2)
