"""Loss, its gradient, and counts of hard predictions."""

import math

import numpy as np
import pytest
import torch

from benchmarks.shared.baselines import independent_dice_ce
from ima_seg.errors import UserError
from ima_seg.ops import (
    dice_ce,
    hard_counts,
    hard_dice,
)
from ima_seg.types import Labels, Target


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


@pytest.mark.parametrize("op", [dice_ce, hard_counts, hard_dice])
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, 3, 4, 5, dtype=torch.int64), "logits are torch.int64"),
        (torch.zeros(2, 4, 4, 5), r"of shape \(2, 4, 4, 5\); the reference expects floating point \(2, 3, \*S\)"),
        (torch.zeros(1, 3, 4, 5), r"of shape \(1, 3, 4, 5\)"),
        (torch.zeros(2, 3, 4, 6), r"of shape \(2, 3, 4, 6\); .* with 20 voxels"),
        (torch.zeros(2, 60), r"of shape \(2, 60\)"),
        (torch.zeros(2, 3, 4, 5, device="meta"), "reference is on cpu, the batch on meta"),
    ],
)
def test_logits_that_do_not_fit_their_reference_are_refused(op, logits, message):
    with pytest.raises(UserError, match=message):
        op(logits, Target.from_raw(torch.zeros(2, 1, 4, 5), Labels(3)))


# Loss and counts


KINDS = {
    "classes": Labels(3),
    "classes, ignore": Labels(3, ignore_label=3),
    "regions": Labels(2, regions=True),
    "regions, ignore": Labels(2, regions=True, ignore_label=9),
}
kinds = pytest.mark.parametrize("labels", KINDS.values(), ids=KINDS)
spaces = pytest.mark.parametrize("space", [(11,), (4, 5), (3, 2, 4)], ids=str)


def scene(labels, space, batch=3, dtype=torch.float64):
    """Logits and raw target; one sample lacks a class, another has a value of no class."""
    channels = labels.outputs + (labels.ignore_label is not None) if labels.regions else 1
    raw = torch.randint(2 if labels.regions else labels.outputs + 1, (batch, channels, *space))
    if labels.ignore_label is None and not labels.regions:
        raw[1] = raw[1].clamp_max(labels.outputs - 1)
    if labels.regions:
        raw[0, 0] = 0
    else:
        raw[0][raw[0] == 1] = 0
    return torch.randn(batch, labels.outputs, *space, dtype=dtype) * 2, raw


@kinds
@spaces
def test_loss_and_gradient_equal_autograd_of_an_independent_float64_loss(labels, space):
    logits, raw = scene(labels, space)
    target, upstream = Target.from_raw(raw, labels), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    theirs = logits.clone().requires_grad_()
    expected = independent_dice_ce(theirs, raw, labels)
    (expected_gradient,) = torch.autograd.grad(expected, theirs, upstream)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        ours = logits.to(dtype).requires_grad_()
        loss = dice_ce(ours, target)
        (gradient,) = torch.autograd.grad(loss, ours, upstream.to(dtype))
        assert loss.dtype == gradient.dtype == dtype
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)


@kinds
@spaces
def test_gradient_of_the_loss_by_differences(labels, space):
    logits, raw = scene(labels, space, batch=2)
    target = Target.from_raw(raw, labels)
    assert torch.autograd.gradcheck(lambda each: dice_ce(each, target), logits.requires_grad_())


def test_a_gradient_in_half_precision_keeps_its_dtype_and_layout():
    logits, raw = scene(Labels(3), (4, 5), dtype=torch.bfloat16)
    logits = logits.to(memory_format=torch.channels_last).requires_grad_()
    dice_ce(logits, Target.from_raw(raw, Labels(3))).sum().backward()
    assert logits.grad.dtype == torch.bfloat16 and logits.grad.stride() == logits.stride()


@kinds
@spaces
def test_counts_against_a_loop(labels, space):
    logits, raw = scene(labels, space, dtype=torch.float32)
    logits.flatten(2)[:, :, 0] = 0.0  # a tie; a probability of one half
    counts, finite = hard_counts(logits, Target.from_raw(raw, labels))
    expected = np.zeros((len(raw), labels.outputs - (not labels.regions), 3), dtype=np.int64)
    for b, (scores, truth) in enumerate(zip(logits.flatten(2).numpy(), raw.flatten(2).numpy(), strict=True)):
        for v in range(scores.shape[1]):
            if labels.regions:
                if labels.ignore_label is not None and truth[-1, v]:
                    continue
                pairs = [(scores[k, v] > 0, truth[k, v] == 1) for k in range(labels.outputs)]
            else:
                if truth[0, v] == labels.ignore_label:
                    continue
                pairs = [(np.argmax(scores[:, v]) == k, truth[0, v] == k) for k in range(1, labels.outputs)]
            for f, (predicted, true) in enumerate(pairs):
                expected[b, f] += predicted and true, predicted, true
    assert counts.dtype == torch.int64 and (counts.numpy() == expected).all()
    assert finite.dtype == torch.bool and finite.all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_counts_say_which_samples_have_logits_that_are_not_finite(bad):
    logits, raw = scene(Labels(3), (4, 5), dtype=torch.float32)
    logits[1, 0, 3, 4] = bad
    assert hard_counts(logits, Target.from_raw(raw, Labels(3)))[1].tolist() == [True, False, True]
