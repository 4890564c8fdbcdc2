"""Square Attack: a random search that asks for logits only, so that no masked gradient can hide a weakness.

Method: Andriushchenko, Croce, Flammarion & Hein, "Square Attack: a query-efficient black-box adversarial attack via
random search", ECCV 2020, arXiv 1912.00049; here for images of any number of dimensions and dense labels.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ima_seg.attacks.noise import scaled_to
from ima_seg.attacks.passes import all_finite
from ima_seg.attacks.problem import Problem, attack
from ima_seg.attacks.result import AttackResult, Best
from ima_seg.ops import per_row

#: Share of the voxels in the first windows.
_FIRST_SHARE = 0.8
#: After which of 10 000 queries the share of the voxels in a window is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@attack
def square(problem: Problem, eps: torch.Tensor, *, queries: int, restarts: int = 1) -> AttackResult:
    """Random search over windows; a proposal is kept where it raises the sample's loss.

    linf: starts from stripes of random sign along the last axis; a window is moved by ±2 eps per channel and projected.
    l2: starts from a tiling of bumps; a window gets a pair of bumps of opposite sign and the mass of a second window,
    which is emptied. Every proposal has exactly the size ``eps``.

    Differences from the paper: it accepts by the loss of the goal, smooth over all voxels, in place of the margin of
    one label; a square is the hyper-cube with the same share of the voxels (a box where an axis is shorter); there is
    no box [0, 1] to clip to; windows lie where there is support; a window that would change nothing is flipped.

    Arguments as for :func:`ima_seg.attacks.pgd`. ``queries``: forwards per sample and restart, the start included; the
    clean image, the first row of the trace, costs one more. The first windows hold 0.8 of the voxels, a share that is
    halved on the paper's schedule. The loss is taken at progress 0 throughout, for its values are compared.
    """
    best, search = Best(problem, eps, queries), _Search(problem, eps)
    linf = problem.threat.norm == "linf"
    best.look(problem.zero(), 0)
    for _ in range(restarts):
        delta = proposal = search.stripes() if linf else search.tiles()
        loss = torch.full(eps.shape, -torch.inf, device=eps.device)
        for query in range(queries):
            if query:
                share = _FIRST_SHARE / 2 ** bisect.bisect_left(_HALVINGS, query * 10_000 // queries)
                proposal = search.flip(delta, share) if linf else search.move(delta, share)
            logits = best.look(proposal, query + 1)
            reached = problem.goal.loss(logits, problem.target, 0.0)
            better = all_finite(logits) & (reached > loss)
            loss = torch.where(better, reached, loss)
            delta = torch.where(per_row(better, delta), proposal, delta)
    return best.result()


class _Window(NamedTuple):
    """A window of one size, kept on the device so that no query copies anything there."""

    edges: torch.Tensor  #: (axes,) int64, voxels along each axis
    offsets: torch.Tensor  #: (V,) flat distance of each of its voxels from its first
    bumps: torch.Tensor  #: (axes, V), a pair of bumps of opposite sign along each axis, of norm 1


class _Search:
    """Proposals for the perturbations (B, C, *S) of a batch."""

    def __init__(self, problem: Problem, eps: torch.Tensor) -> None:
        self.zero = problem.zero()
        self.problem, self.eps = problem, eps.to(self.zero.dtype)
        self.space = tuple(self.zero.shape[2:])
        strides = [math.prod(self.space[axis + 1 :]) for axis in range(len(self.space))]
        self.strides = torch.tensor(strides, device=eps.device)
        self.lengths = torch.tensor(self.space, device=eps.device)
        self.windows: dict[tuple[int, ...], _Window] = {}
        support = problem.support
        self.open = None if support is None else support.expand_as(self.zero).flatten(2)
        # (B, N): how many voxels up to here may be changed in some channel, to draw one of them.
        self.count = None if self.open is None else self.open.any(1).cumsum(1)

    def stripes(self) -> torch.Tensor:
        """±eps, one sign per channel and position along the last axis."""
        signs = self._signs(*self.zero.shape[:2], *(1,) * (len(self.space) - 1), self.space[-1])
        return self.problem.supported((signs * per_row(self.eps, signs)).expand_as(self.zero))

    def tiles(self) -> torch.Tensor:
        """Bump pairs on a grid of five or some more tiles per axis, of random sign, of size eps."""
        edges = [max(length // 5, 1) for length in self.space]
        grid = [math.ceil(length / edge) for length, edge in zip(self.space, edges, strict=True)]
        pairs = self._window(tuple(edges)).bumps.view(-1, *edges).repeat(1, *grid)
        signs = self._signs(*self.zero.shape[:2], *grid)
        for axis, edge in enumerate(edges):
            signs = signs.repeat_interleave(edge, axis + 2)
        tiled = signs * pairs[self._axes()][:, None]
        cropped = tiled[(slice(None), slice(None), *(slice(length) for length in self.space))]
        return scaled_to(self.problem.supported(cropped), self.eps, "l2")

    def flip(self, delta: torch.Tensor, share: float) -> torch.Tensor:
        """linf: one window per sample moved by ±2 eps per channel, then projected."""
        window = self._window(_edges(self.space, share, least=1))
        index = self._place(window)
        old = delta.flatten(2).gather(2, index)
        signs = self._signs(*delta.shape[:2], 1)
        eps = per_row(self.eps, old)
        unchanged = old == eps * signs
        if self.open is not None:
            unchanged = unchanged | ~self.open.gather(2, index)
        signs = torch.where(per_row(unchanged.flatten(1).all(1), signs), -signs, signs)
        new = torch.maximum(torch.minimum(old + 2 * eps * signs, eps), -eps)
        return self.problem.supported(delta.flatten(2).scatter(2, index, new).view_as(delta))

    def move(self, delta: torch.Tensor, share: float) -> torch.Tensor:
        """l2: one window per sample gets a pair of bumps and the mass of another window, which is emptied."""
        window = self._window(_edges(self.space, share, least=3))
        first, second = self._place(window), self._place(window)
        flat = delta.flatten(2)
        old = flat.gather(2, first)
        rest = flat.scatter(2, first, 0.0)
        taken = rest.gather(2, second)
        rest = rest.scatter(2, second, 0.0)
        # What a channel may hold in the window: what both windows held, and its part of what is not spent at all.
        budget = self.eps.square() * flat[0].numel()
        unspent = (budget - flat.square().sum((1, 2))).clamp_min(0) / flat.shape[1]
        mass = old.square().sum(2, keepdim=True) + taken.square().sum(2, keepdim=True) + per_row(unspent, old)
        pairs = window.bumps[self._axes()][:, None] * self._signs(*flat.shape[:2], 1)
        new = pairs + old / old.norm(dim=2, keepdim=True).clamp_min(1e-10)
        if self.open is not None:
            new = new * self.open.gather(2, first)
        length = new.norm(dim=2, keepdim=True)
        new = new * torch.where(length > 0, mass.sqrt() / length, torch.zeros_like(length))
        return scaled_to(rest.scatter(2, first, new).view_as(delta), self.eps, "l2")

    def _window(self, edges: tuple[int, ...]) -> _Window:
        if edges not in self.windows:
            device = self.zero.device
            axes = [torch.arange(edge, device=device) for edge in edges]
            grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
            pairs = torch.stack([_bump_pair(edges, axis).flatten() for axis in range(len(edges))])
            self.windows[edges] = _Window(
                self.lengths.new_tensor(edges), (grid * self.strides).sum(1), pairs.to(self.zero)
            )
        return self.windows[edges]

    def _place(self, window: _Window) -> torch.Tensor:
        """A random place per sample: (B, C, V) flat indices of the voxels of the window."""
        size, channels = self.zero.shape[:2]
        share = self._random(size, len(self.space))
        if self.count is None:
            start = (share * (self.lengths - window.edges + 1)).long()
        else:
            rank = (self._random(size, 1) * self.count[:, -1:]).long() + 1
            # Clamped for a sample without support, and for a product that rounds up to the count.
            voxel = torch.searchsorted(self.count, rank).clamp_max(self.count.shape[1] - 1)
            start = voxel // self.strides % self.lengths - (share * window.edges).long()
        start = torch.minimum(start.clamp_min(0), self.lengths - window.edges)
        index = (start * self.strides).sum(1, keepdim=True) + window.offsets
        return index[:, None].expand(-1, channels, -1)

    def _random(self, *shape: int) -> torch.Tensor:
        """Uniform from [0, 1)."""
        return torch.rand(shape, device=self.zero.device, generator=self.problem.generator)

    def _signs(self, *shape: int) -> torch.Tensor:
        """Random signs, ±1."""
        return torch.where(self._random(*shape) < 0.5, -1.0, 1.0).to(self.zero.dtype)

    def _axes(self) -> torch.Tensor:
        """A random axis per sample, (B,) int64."""
        return (self._random(len(self.zero)) * len(self.space)).long().clamp_max(len(self.space) - 1)


def _edges(space: Sequence[int], share: float, least: int) -> tuple[int, ...]:
    """Edges, in voxels, of the box nearest to a cube with ``share`` of the voxels.

    At least ``least`` voxels and less than the whole axis, where that is possible: what a short axis cannot hold is
    given to the longer ones.
    """
    volume = share * math.prod(space)
    edges = [1] * len(space)
    by_length = sorted(range(len(space)), key=lambda axis: space[axis])
    for done, axis in enumerate(by_length):
        wanted = round(volume ** (1 / (len(space) - done)))
        edges[axis] = max(1, min(max(wanted, least), space[axis] - 1))
        volume = max(volume / edges[axis], 1.0)
    return tuple(edges)


def _bump_pair(edges: tuple[int, ...], axis: int) -> torch.Tensor:
    """Two bumps side by side along ``axis``, of opposite sign, together of norm 1: the paper's eta, of shape ``edges``.

    A bump falls off with the largest coordinate distance d from its middle as the sum over j >= d of 1 / (j + 1)^2.
    """
    half = edges[axis] // 2
    halves = []
    for sign, length in ((1.0, half), (-1.0, edges[axis] - half)):
        if not length:
            continue
        shape = (*edges[:axis], length, *edges[axis + 1 :])
        furthest = max(shape) // 2
        rings = 1 / torch.arange(1, furthest + 2, dtype=torch.float64).square()
        height = rings.flip(0).cumsum(0).flip(0)
        distance = torch.zeros(shape, dtype=torch.int64)
        for along, edge in enumerate(shape):
            steps = (torch.arange(edge) - edge // 2).abs()
            distance = torch.maximum(distance, steps.view(-1, *(1,) * (len(shape) - along - 1)))
        bump = height[distance]
        halves.append(sign * bump / bump.norm())
    pair = torch.cat(halves, axis)
    return pair.div(pair.norm())
