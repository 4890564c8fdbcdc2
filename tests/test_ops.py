import math

import pytest
import torch

from ima_seg.ops import draw_seeds, gradient_step, hard_dice, perturbation_size, project, random_start
from ima_seg.types import Labels, Target, ThreatModel

SHAPES = [(3, 1, 7), (1, 2, 5, 3), (4, 1, 3, 5, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_step_equals_float64_reference_sample_by_sample(shape, norm):
    delta, gradient = torch.randn(shape) * 0.1, torch.randn(shape)
    alpha, eps = torch.rand(shape[0]) * 0.2, torch.rand(shape[0]) * 0.2
    ours, _ = gradient_step(delta.clone(), gradient, alpha=alpha, eps=eps, norm=norm)
    for i in range(shape[0]):
        d, g = delta[i].double(), gradient[i].double()
        voxels = d.numel()
        if norm == "l2":
            d = d + alpha[i].double() * math.sqrt(voxels) * g / g.norm()
            radius = eps[i].double() * math.sqrt(voxels)
            expected = d * min(1.0, float(radius / d.norm()))
        else:
            expected = (d + alpha[i].double() * g.sign()).clamp(-eps[i].double(), eps[i].double())
        torch.testing.assert_close(ours[i].double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_step_leaves_samples_without_usable_gradient(norm):
    delta = torch.full((4, 1, 6), 0.05)
    gradient = torch.randn(4, 1, 6)
    gradient[1], gradient[2, 0, 0], gradient[3, 0, 5] = 0, float("nan"), float("inf")
    eps = torch.full((4,), 1.0)
    moved, _ = gradient_step(delta, gradient, alpha=eps * 0.1, eps=eps, norm=norm)
    assert torch.equal(moved[1:], delta[1:])
    assert not torch.equal(moved[0], delta[0])


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_zero_budget_gives_no_perturbation(norm):
    delta, zero = torch.zeros(2, 1, 4, 4), torch.zeros(2)
    assert gradient_step(delta, torch.randn(2, 1, 4, 4), alpha=zero + 1, eps=zero, norm=norm)[0].abs().max() == 0
    assert random_start(delta, zero, norm, draw_seeds(2, delta.device)).abs().max() == 0


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_projection_keeps_what_is_inside_and_reaches_the_sphere_outside(norm):
    delta = torch.randn(2, 1, 8, 8)
    delta[0] *= 0.1 / perturbation_size(delta, norm)[0]
    delta[1] *= 0.9 / perturbation_size(delta, norm)[1]
    before = delta.clone()
    project(delta, torch.tensor([0.5, 0.5]), norm)
    torch.testing.assert_close(delta[0], before[0])
    torch.testing.assert_close(perturbation_size(delta, norm)[1], torch.tensor(0.5))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_random_start_is_seeded_and_within_its_radius(norm):
    like, radius = torch.zeros(50, 1, 6, 6), torch.linspace(0.01, 0.5, 50)
    first = random_start(like, radius, norm, draw_seeds(50, like.device, torch.Generator().manual_seed(3)))
    again = random_start(like, radius, norm, draw_seeds(50, like.device, torch.Generator().manual_seed(3)))
    assert torch.equal(first, again)
    size = perturbation_size(first, norm)
    assert (size <= radius * (1 + 1e-5)).all()
    assert (size > 0).all()
    # Spread over the ball, not all on its surface or at its centre.
    share = size / radius
    assert share.mean() > 0.3
    assert norm == "linf" or share.min() < 0.2


def test_size_is_root_mean_square_so_it_carries_over_between_patch_sizes():
    threat = ThreatModel("l2")
    assert threat.from_total(15, 56 * 40) == pytest.approx(0.317, abs=5e-4)
    assert threat.to_total(threat.from_total(15, 56 * 40), 40 * 56 * 40) == pytest.approx(94.87, abs=0.01)
    assert ThreatModel("linf").to_total(0.3, 1000) == 0.3
    assert perturbation_size(torch.full((1, 2, 9, 9), -0.2), "l2").item() == pytest.approx(0.2)


def test_hard_dice_against_monai():
    from monai.metrics import compute_dice

    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 4, 6, 7, 5, generator=generator)
    labels = torch.randint(0, 4, (5, 1, 6, 7, 5), generator=generator)
    labels[1][labels[1] == 2] = 0  # a class that sample lacks
    labels[2] = 0  # no foreground
    target = Target.from_raw(labels, Labels(4))
    ours = hard_dice(logits, target)
    prediction = torch.nn.functional.one_hot(logits.argmax(1), 4).movedim(-1, 1)
    reference = torch.nn.functional.one_hot(labels[:, 0], 4).movedim(-1, 1)
    # MONAI gives NaN for classes absent from the reference, the mean leaves them out.
    expected = compute_dice(prediction, reference, include_background=False, ignore_empty=True).nanmean(1)
    torch.testing.assert_close(ours, expected, equal_nan=True)
    assert ours[2].isnan()


def test_hard_dice_ignores_ignored_voxels_and_reads_regions():
    labels = torch.tensor([[[0, 1, 1, 2, 2, 0]]])  # 2 is the ignore label
    wrong_where_ignored = torch.tensor([[[5.0, -5, -5, -5, 5, 5], [-5, 5, 5, 5, -5, -5]]])
    assert hard_dice(wrong_where_ignored, Target.from_raw(labels, Labels(2, ignore_label=2))).item() == 1
    regions = torch.tensor([[[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]])  # whole, core, ignored
    logits = torch.tensor([[[-1.0, 1, 1, -1], [-1, 1, 1, -1]]])
    dice = hard_dice(logits, Target.from_raw(regions, Labels(2, regions=True, ignore_label=3)))
    assert dice.item() == pytest.approx((1 + 2 / 3) / 2)


def test_ties_go_to_the_first_class_as_with_argmax():
    from ima_seg.ops.reference import _argmax

    logits = torch.randint(0, 3, (2, 4, 50)).float()
    assert torch.equal(_argmax(logits), logits.argmax(1))
