"""The differentiable sliding window against nnU-Net's predictor and against autograd on the whole."""

import itertools

import pytest
import torch
from torch import nn

from ima_seg.attacks.tiling import Tiling
from ima_seg.errors import UserError
from ima_seg.nnunet.tiling import SlidingWindow
from tests.models import TinyUNet


def window(dims=3, patch=(8, 8, 8), networks=1, **options):
    return SlidingWindow([TinyUNet(dims) for _ in range(networks)], patch_size=patch[:dims], **options)


def plain(sliding, x):
    """The same logits in one autograd graph over all tiles, passes and folds: for small inputs only."""
    padded, inside = sliding._pad(x)
    gaussian, weight = sliding._weights(padded.shape, x.device)
    total = 0
    for batch in sliding._batches(padded.shape):
        for index in batch:
            tile = padded[index][None]
            logits = sum(sliding._passes(tile))[0] * gaussian
            canvas = torch.zeros(x.shape[0], logits.shape[0], *padded.shape[2:])
            canvas[index] = logits
            total = total + canvas
    return (total * weight)[(slice(None), slice(None), *inside)]


CASES = {
    "one tile": ((1, 1, 8, 8, 8), {}),
    "many tiles": ((1, 1, 13, 9, 16), {}),
    "tiles in batches": ((1, 1, 13, 9, 16), {"tile_batch": 3}),
    "padded": ((1, 1, 5, 12, 8), {}),
    "mirrored": ((1, 1, 12, 8, 9), {"mirror_axes": (0, 2)}),
    "ensemble": ((1, 1, 12, 8, 8), {"networks": 2}),
    "coarse": ((2, 1, 20, 8, 8), {"step_size": 1.0, "tile_batch": 2}),
    "slices": ((5, 1, 11, 8), {"dims": 2, "tile_batch": 4}),
    "stack of slices": ((1, 1, 3, 11, 8), {"dims": 2, "mirror_axes": (0, 1)}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradient_are_those_of_one_graph_over_all_tiles(name):
    shape, options = CASES[name]
    sliding = window(**options)
    x = torch.randn(shape)
    flat = x.transpose(1, 2).flatten(0, 1) if name == "stack of slices" else x
    leaf = flat.clone().requires_grad_(True)
    expected = plain(sliding, leaf)
    outer = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, leaf, outer)
    if name == "stack of slices":
        expected, outer, gradient = (t.unflatten(0, (1, 3)).transpose(1, 2) for t in (expected, outer, gradient))
    ours = x.clone().requires_grad_(True)
    logits = sliding(ours)
    (ours_gradient,) = torch.autograd.grad(logits, ours, outer)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.allclose(ours_gradient, gradient, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(sliding(x), expected, atol=1e-5)


def test_gradient_agrees_with_finite_differences_in_double_precision():
    sliding = SlidingWindow([nn.Conv1d(1, 2, 3, padding=1).double()], patch_size=(4,), step_size=0.5)
    x = torch.randn(1, 1, 7, dtype=torch.float64, requires_grad=True)
    # blended in float32
    assert torch.autograd.gradcheck(lambda v: sliding(v).double(), (x,), eps=1e-2, atol=1e-3, nondet_tol=1e-6)


def test_only_one_batch_of_tiles_keeps_its_activations():
    """Of all tiles together at most one graph is alive, however many tiles there are."""
    alive, most = 0, 0

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            nonlocal alive, most
            if torch.is_grad_enabled() or ctx.needs_input_grad[0]:
                alive += len(x)
                most = max(most, alive)
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            nonlocal alive
            alive -= len(gradient)
            return gradient * 2

    class Net(nn.Module):
        def forward(self, x):
            return Kept.apply(x).repeat(1, 2, 1, 1, 1)

    sliding = SlidingWindow([Net()], patch_size=(4, 4, 4), tile_batch=2, mirror_axes=(0,))
    x = torch.randn(1, 1, 12, 12, 12, requires_grad=True)
    torch.autograd.grad(sliding(x).square().sum(), x)
    assert sliding.tiles(x.shape) == 125
    assert most == 2
    assert alive == 0


def test_a_step_costs_two_forwards_and_one_gradient_per_tile():
    counts = {"plain": 0, "graph": 0}

    class Net(nn.Module):
        def forward(self, x):
            counts["graph" if x.requires_grad and torch.is_grad_enabled() else "plain"] += len(x)
            return x.repeat(1, 2, 1, 1, 1)

    sliding = SlidingWindow([Net()], patch_size=(4, 4, 4), tile_batch=4)
    x = torch.randn(1, 1, 8, 8, 8, requires_grad=True)
    torch.autograd.grad(sliding(x).square().sum(), x)
    tiles = sliding.tiles(x.shape)
    assert tiles == len(list(itertools.product(range(3), repeat=3)))
    assert counts == {"plain": tiles, "graph": tiles}


def test_autocast_of_the_forward_pass_holds_in_the_backward_pass():
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 2, 1)

        def forward(self, x):
            out = self.conv(x)
            seen.append(out.dtype)
            return out

    sliding = SlidingWindow([Net()], patch_size=(4, 4, 4))
    x = torch.randn(1, 1, 6, 4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = sliding(x)
    torch.autograd.grad(logits.sum(), x)
    assert set(seen) == {torch.bfloat16} and logits.dtype == torch.float32


def test_tiles_without_overlap_lie_evenly_and_average_without_weights():
    network = TinyUNet(3)
    tiling, sliding = (kind([network], patch_size=(8, 8, 8), step_size=1.0) for kind in (Tiling, SlidingWindow))
    for size in ((8, 13, 31), (24, 9, 17), (100, 16, 8)):
        assert tiling._steps(size) == sliding._steps(size)
    x = torch.randn(1, 1, 16, 8, 12, requires_grad=True)
    logits = tiling(x)
    halves = network(x[:, :, :8, :, :8]), network(x[:, :, :8, :, 4:])
    expected = torch.cat([halves[0][..., :4], (halves[0][..., 4:] + halves[1][..., :4]) / 2, halves[1][..., 4:]], -1)
    assert torch.allclose(logits[:, :, :8], expected, atol=1e-5)
    assert tiling.tiles(x.shape) == 4 and torch.autograd.grad(logits.sum(), x)[0].abs().min() > 0


def test_flags_and_bad_arguments():
    network = TinyUNet(3, batch_norm=True).train()
    sliding = SlidingWindow([network], patch_size=(8, 8, 8))
    assert not any(p.requires_grad for p in sliding.parameters()) and not network.training
    with pytest.raises(UserError, match="step size"):
        SlidingWindow([network], patch_size=(8, 8, 8), step_size=1.5)
    with pytest.raises(UserError, match="does not fit the patch size"):
        sliding(torch.zeros(1, 1, 8, 8))
