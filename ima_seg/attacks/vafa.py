"""VAFA: an attack that quantises the frequencies of an image, so that it takes detail away rather than adding noise.

Method: Hanif, Naseer, Khan, Shah & Khan, "Frequency domain adversarial training for robust volumetric medical
segmentation", MICCAI 2023, arXiv 2307.07269.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from scipy.fft import dct

from ima_seg.attacks.problem import Problem, attack
from ima_seg.attacks.result import AttackResult, Best
from ima_seg.ops import per_row, perturbation_size
from ima_seg.types import Norm

#: Edge of a block, in voxels.
_BLOCK = 8
#: Largest over smallest quantisation step, as 20 over 5 in the authors' code.
_Q_RANGE = 4.0

#: Found by trial on small networks: from the clip of linf a perturbation recovers, from the scaling of l2 less so.
_HEADROOM: dict[Norm, float] = {"l2": 1.5, "linf": 3.0}


@attack
def vafa(problem: Problem, eps: torch.Tensor, *, steps: int, restarts: int = 1) -> AttackResult:
    """Sign-gradient ascent on the quantisation steps q of a block-wise cosine transform.

    Each block of the image is transformed, every coefficient c becomes q * round(c / q), and the block is transformed
    back. Each coefficient of each block has its own q in [q_max / 4, q_max]; the rounding is smooth,
    r(z) = z - sin(2 pi z) / (2 pi), so an attacked coefficient moves by q / (2 pi) at most.

    The scale of q: the images are z-scored, so the paper's q_max, in grey values of 0..255, means nothing here. q_max
    is set per sample to the step at which quantising all coefficients alike makes a perturbation of 1.5 ``eps`` (l2) or
    3 ``eps`` (linf): once the steps of the less harmful frequencies have shrunk, it would be smaller than allowed
    otherwise. Quantisation can take away no more than the image holds, so this headroom shrinks where ``eps``
    comes near the size of the image itself (RMS 1 for z-scores), and beyond that some of the budget stays unused.

    Differences from the paper: a budget. The perturbation x' - x is masked, then projected onto the ball of size
    ``eps``, while the paper bounds q alone and rescales each slice of x' to [0, 1]. No structural similarity (SSIM) is
    added to the objective: the budget does its work. Steps of q are a share of its range, not 1; the smooth rounding
    above stands for a steepening tanh; images are edge-padded to whole blocks; the worst point visited is returned.

    Arguments as for :func:`ima_seg.attacks.pgd`. Of the ``restarts`` the first starts at q = q_max as the paper does,
    the others at random tables. A step is 2 (q_max - q_min) / ``steps`` long. Blocks have edges of 8 voxels; an axis
    shorter than that is one block.
    """
    norm, best, quantised = problem.threat.norm, Best(problem, eps, steps), _Quantised(problem, _BLOCK)
    q_max = per_row(quantised.uniform_step(eps, _HEADROOM[norm]), quantised.coefficients)
    q_min = q_max / _Q_RANGE
    alpha = 2 * (q_max - q_min) / steps
    best.look(problem.zero(), 0)
    for restart in range(restarts):
        share = torch.ones_like(quantised.coefficients)
        if restart:
            share.uniform_(generator=problem.generator)
        q = q_min + share * (q_max - q_min)
        for step in range(steps):
            q.requires_grad_(True)
            with torch.enable_grad():
                delta = _projected(quantised.perturbation(q), eps, norm)
            here = best.passes.at(delta.detach(), step / steps)
            best.visit(delta.detach(), here.logits, step)
            gradient = here.gradient()
            del here
            (slope,) = torch.autograd.grad(delta, q, gradient.to(delta.dtype))
            best.count(perturbation_size(slope, "linf"))
            # The sign of NaN would stay NaN in the table for good.
            q = torch.clamp(q.detach() + alpha * torch.nan_to_num(slope).sign(), q_min, q_max)
        best.look(_projected(quantised.perturbation(q), eps, norm), steps)
    return best.result()


def _projected(delta: torch.Tensor, eps: torch.Tensor, norm: Norm) -> torch.Tensor:
    """``delta`` (B, C, *S) within its ball, as a new tensor; for l2 its gradient takes the scale as constant."""
    if norm == "linf":
        radius = per_row(eps, delta).to(delta.dtype)
        return torch.clamp(delta, -radius, radius)
    size = perturbation_size(delta.detach(), norm)
    return delta * per_row(torch.where(size > eps, eps / size, 1.0), delta).to(delta.dtype)


class _Quantised:
    """The cosine coefficients of a batch, and what becomes of the batch when they are quantised."""

    def __init__(self, problem: Problem, block: int) -> None:
        image = problem.image.to(problem.zero().dtype)
        self.problem, self.space = problem, tuple(image.shape[2:])
        self.edges = tuple(min(block, length) for length in self.space)
        self.whole = perturbation_size(problem.supported(image), problem.threat.norm)
        self.coefficients = block_transform(split(image, self.edges), self.edges)

    def perturbation(self, q: torch.Tensor) -> torch.Tensor:
        """The perturbation (B, image channels, *S) for the steps ``q``, shaped as the coefficients; differentiable."""
        # The difference itself, not two images: at small q it would drown in their rounding.
        moved = -q / (2 * math.pi) * torch.sin(2 * math.pi * self.coefficients / q)
        return self.problem.supported(join(block_transform(moved, self.edges, inverse=True), self.space))

    def uniform_step(self, eps: torch.Tensor, headroom: float) -> torch.Tensor:
        """The step, one per sample, (B,), that makes perturbations of ``headroom * eps`` when all coefficients have it.

        By bisection on its logarithm, without the network. At 20 times the largest coefficient all are gone but 2 %.
        """
        # Near the size of the whole image all coefficients are zero, and no longer depend on their steps.
        size = torch.minimum(headroom * eps, torch.maximum(eps, 0.7 * self.whole))
        largest = self.coefficients.flatten(1).abs().amax(1)
        high = (20 * largest).clamp_min(1e-20)
        # A coefficient moves by q / (2 pi) at most, and a voxel by no more than all of those of its block together.
        low = torch.minimum(size.to(high.dtype) / math.sqrt(math.prod(self.edges)), high).clamp_min(1e-20)
        for _ in range(24):
            middle = (low * high).sqrt()
            delta = self.perturbation(per_row(middle, self.coefficients))
            enough = perturbation_size(delta, self.problem.threat.norm) >= size
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return high


@functools.lru_cache(maxsize=32)
def cosine_matrix(edge: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The orthonormal DCT-II as a matrix (frequency, voxel)."""
    return torch.from_numpy(dct(np.eye(edge), axis=0, norm="ortho")).to(device, dtype)


def split(image: torch.Tensor, edges: tuple[int, ...]) -> torch.Tensor:
    """(B, C, *S) -> (B, C, blocks, edge, blocks, edge, ...), edge-padded to whole blocks."""
    shape = list(image.shape[:2])
    for axis, edge in enumerate(edges):
        length = image.shape[axis + 2]
        blocks = math.ceil(length / edge)
        if blocks * edge > length:
            voxels = torch.arange(blocks * edge, device=image.device).clamp_max(length - 1)
            image = image.index_select(axis + 2, voxels)
        shape += [blocks, edge]
    return image.reshape(shape)


def join(blocks: torch.Tensor, space: tuple[int, ...]) -> torch.Tensor:
    """The inverse of :func:`split`: (B, C, *S) of the spatial shape ``space``, cropped."""
    for axis in range(len(space)):
        blocks = blocks.flatten(axis + 2, axis + 3)
    return blocks[(slice(None), slice(None), *(slice(length) for length in space))]


def block_transform(blocks: torch.Tensor, edges: tuple[int, ...], inverse: bool = False) -> torch.Tensor:
    """The orthonormal cosine transform of each block of ``blocks``, of the shape that :func:`split` makes."""
    for axis, edge in enumerate(edges):
        matrix = cosine_matrix(edge, blocks.device, blocks.dtype)
        along = 3 + 2 * axis
        # matmul over the last axis: what it yields keeps its place among the blocks.
        blocks = (blocks.transpose(along, -1) @ (matrix if inverse else matrix.T)).transpose(along, -1)
    return blocks
