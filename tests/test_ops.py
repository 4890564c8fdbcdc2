import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from benchmarks.shared.baselines import independent_dice_ce, plain_step
from ima_seg.errors import UserError
from ima_seg.ops import (
    dice_ce,
    draw_seeds,
    gradient_step,
    hard_counts,
    hard_dice,
    interpolate,
    perturbation_size,
    project,
    random_start,
)
from ima_seg.ops.philox import normal_field, philox
from ima_seg.types import Labels, Target, ThreatModel

SHAPES = [(3, 1, 7), (1, 2, 5, 3), (4, 1, 3, 5, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_step_equals_float64_reference_sample_by_sample(shape, norm):
    delta, gradient = torch.randn(shape) * 0.1, torch.randn(shape)
    alpha, eps = torch.rand(shape[0]) * 0.2, torch.rand(shape[0]) * 0.2
    ours, _ = gradient_step(delta.clone(), gradient, alpha=alpha, eps=eps, norm=norm)
    inputs = {"delta": delta, "gradient": gradient, "alpha": alpha, "eps": eps}
    for i in range(shape[0]):
        expected, _ = plain_step(norm, {name: value[i : i + 1].double() for name, value in inputs.items()})
        torch.testing.assert_close(ours[i : i + 1].double(), expected, atol=1e-6, rtol=1e-5)


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


# What is refused. A value given instead of one of these is named.


def step_arguments():
    x, per_sample = torch.zeros(2, 3, 4, 5), torch.full((2,), 0.1)
    image = torch.rand_like(x)
    return {"delta": x, "gradient": x + 1, "alpha": per_sample, "eps": per_sample, "norm": "l2", "mask": x == 0,
            "image": image, "box": (per_sample * 0, per_sample + 1)}  # fmt: skip


def call_step(arguments):
    positional = [arguments.pop("delta"), arguments.pop("gradient")]
    return gradient_step(*positional, **arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("delta", torch.zeros(2, 3, 4, 5, dtype=torch.int64), r"delta is torch.int64 of shape \(2, 3, 4, 5\)"),
        (
            "delta",
            torch.zeros(2, 3),
            r"delta is torch.float32 of shape \(2, 3\); expected floating point \(B, C, \*S\)",
        ),
        ("gradient", torch.zeros(2, 3, 4, 5, dtype=torch.int32), "gradient is torch.int32"),
        ("gradient", torch.zeros(2, 3, 5, 4), r"gradient is torch.float32 of shape \(2, 3, 5, 4\); .*\(2, 3, 4, 5\)"),
        ("gradient", torch.zeros(1, 3, 4, 5), r"gradient is torch.float32 of shape \(1, 3, 4, 5\)"),
        ("gradient", torch.zeros(2, 3, 4, 5, device="meta"), "gradient is on meta, the batch on cpu"),
        ("eps", torch.ones(3), r"eps is torch.float32 of shape \(3,\) for a batch of 2"),
        ("eps", torch.tensor(0.1), r"eps is torch.float32 of shape \(\) for a batch of 2"),
        ("eps", torch.ones(2, dtype=torch.int64), "eps is torch.int64"),
        ("eps", torch.ones(2, device="meta"), "eps is on meta"),
        ("alpha", torch.ones(2, 1), r"alpha is torch.float32 of shape \(2, 1\)"),
        ("alpha", torch.ones(2, dtype=torch.int32), "alpha is torch.int32"),
        ("mask", torch.ones(2, 3, 4, 5), "mask is torch.float32"),
        ("mask", torch.ones(2, 3, 4, 5, dtype=torch.uint8), "mask is torch.uint8"),
        ("mask", torch.ones(3, 4, 5, dtype=torch.bool), r"mask is torch.bool of shape \(3, 4, 5\)"),
        ("mask", torch.ones(2, 2, 4, 5, dtype=torch.bool), r"mask .*\(2, 2, 4, 5\); .*broadcasts to \(2, 3, 4, 5\)"),
        ("mask", torch.ones(2, 3, 4, 5, dtype=torch.bool, device="meta"), "mask is on meta"),
        ("image", None, "give image and box together"),
        ("box", None, "give image and box together"),
        ("image", torch.zeros(2, 3, 4, 6), r"image is torch.float32 of shape \(2, 3, 4, 6\)"),
        ("image", torch.zeros(2, 3, 4, 5, dtype=torch.uint8), "image is torch.uint8"),
        ("image", torch.zeros(2, 3, 4, 5, device="meta"), "image is on meta"),
        ("box", (torch.zeros(2), torch.ones(1)), r"high is torch.float32 of shape \(1,\)"),
        ("box", (torch.zeros(2, dtype=torch.int64), torch.ones(2)), "low is torch.int64"),
        ("box", (torch.zeros(2, device="meta"), torch.ones(2)), "low is on meta"),
    ],
)
def test_a_step_refuses_what_does_not_fit(name, value, message):
    call_step(step_arguments())
    with pytest.raises(UserError, match=message):
        call_step({**step_arguments(), name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("like", torch.zeros(2, 1, 4, dtype=torch.int64), "like is torch.int64"),
        ("like", torch.zeros(2, 4), r"like is torch.float32 of shape \(2, 4\)"),
        ("radius", torch.ones(1), r"radius is torch.float32 of shape \(1,\) for a batch of 2"),
        ("radius", torch.ones(2, dtype=torch.int64), "radius is torch.int64"),
        ("radius", torch.ones(2, device="meta"), "radius is on meta"),
        ("seeds", torch.zeros(2, dtype=torch.int32), "seeds are torch.int32"),
        ("seeds", torch.zeros(2), "seeds are torch.float32"),
        ("seeds", torch.zeros(3, dtype=torch.int64), r"seeds are torch.int64 of shape \(3,\)"),
        ("seeds", torch.zeros(2, dtype=torch.int64, device="meta"), "seeds .* on meta"),
        ("mask", torch.ones(2, 1, 4), "mask is torch.float32"),
        ("mask", torch.ones(2, 1, 5, dtype=torch.bool), r"mask is torch.bool of shape \(2, 1, 5\)"),
    ],
)
def test_a_random_start_refuses_what_does_not_fit(name, value, message):
    arguments = {"like": torch.zeros(2, 1, 4), "radius": torch.ones(2), "norm": "l2", "seeds": torch.tensor([1, 2])}
    random_start(**arguments)
    with pytest.raises(UserError, match=message):
        random_start(**{**arguments, name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inner", torch.zeros(2, 1, 4, dtype=torch.int64), "inner is torch.int64"),
        ("outer", torch.zeros(2, 1, 5), r"outer is torch.float32 of shape \(2, 1, 5\)"),
        ("outer", torch.zeros(2, 1, 4, device="meta"), "outer is on meta"),
        ("share", torch.zeros(3), r"share is torch.float32 of shape \(3,\)"),
        ("share", torch.zeros(2, dtype=torch.int64), "share is torch.int64"),
        ("share", torch.zeros(2, device="meta"), "share is on meta"),
    ],
)
def test_an_interpolation_refuses_what_does_not_fit(name, value, message):
    arguments = {"inner": torch.zeros(2, 1, 4), "outer": torch.ones(2, 1, 4), "share": torch.ones(2), "norm": "l2"}
    interpolate(**arguments)
    with pytest.raises(UserError, match=message):
        interpolate(**{**arguments, name: value})


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


# Random starts


def scalar_philox(counter, key):
    """Philox4x32-10 word by word in Python's integers, which never wrap."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 ^ b ^ k0, second % 2**32, first >> 32 ^ d ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [a, b, c, d]


#: Counter, key and result; the known-answer tests of Random123.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(low, high):
    """Two words as one int64."""
    whole = high << 32 | low
    return whole - (whole >> 63 << 64)


def test_philox_gives_the_known_answers():
    for counter, key, words in KNOWN_ANSWERS:
        assert scalar_philox(counter, key) == list(words)
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox(zero, zero, 0).flatten().tolist() == list(KNOWN_ANSWERS[0][2])
    # The last word of our counter is always zero, so the others are reached by way of the scalar version.
    seeds = [(0, 0), *(key for _, key, _ in KNOWN_ANSWERS), (1, 0), (0, 1), (0xDEADBEEF, 0x7FFFFFFF)]
    counters = [*(counter[:2] for counter, _, _ in KNOWN_ANSWERS), (1, 0), (0, 1), (2**31, 3)]
    for stream in (0, 1, 0x13198A2E, 0xFFFFFFFF):
        ours = philox(torch.tensor([signed(*s) for s in seeds]), torch.tensor([signed(*c) for c in counters]), stream)
        assert ours.tolist() == [[scalar_philox((*c, stream, 0), s) for c in counters] for s in seeds]


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("space", [(9,), (4, 7), (3, 5, 4)], ids=str)
def test_noise_of_a_sample_follows_from_its_own_seed_alone(norm, space):
    like, radius = torch.zeros(6, 3, *space), torch.linspace(0.1, 0.6, 6)
    seeds = torch.tensor([5, 2**62 - 1, 0, -7, 5, 2**40])
    radius[4] = radius[0]
    mask = torch.rand(6, 1, *space) < 0.7
    for masked in (None, mask):
        whole = random_start(like, radius, norm, seeds, masked)
        assert torch.equal(whole[0], whole[4]) == (masked is None), "of equal seeds"
        assert len({float(each.abs().sum()) for each in whole}) == 5 + (masked is not None)
        order = torch.tensor([3, 1, 5, 0, 2, 4])
        shuffled = random_start(like, radius[order], norm, seeds[order], None if masked is None else masked[order])
        torch.testing.assert_close(shuffled, whole[order], rtol=1e-6, atol=0)
        for i in range(6):
            rows = slice(i, i + 1)
            alone = random_start(like[rows], radius[rows], norm, seeds[rows], None if masked is None else masked[rows])
            torch.testing.assert_close(alone, whole[rows], rtol=1e-6, atol=0)
        if len(space) > 1:
            last = torch.channels_last if len(space) == 2 else torch.channels_last_3d
            other = random_start(like.to(memory_format=last), radius, norm, seeds, masked)
            assert other.is_contiguous(memory_format=last) and torch.equal(other, whole)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_has_the_dtype_of_the_batch_and_the_values_of_float32(norm, dtype):
    like, radius, seeds = torch.zeros(3, 2, 40), torch.full((3,), 0.5), torch.tensor([1, 2, 3])
    expected = random_start(like, radius, norm, seeds)
    ours = random_start(like.to(dtype), radius, norm, seeds)
    assert ours.dtype == dtype
    rtol = max(torch.finfo(dtype).eps, 1e-4)
    torch.testing.assert_close(ours.float(), expected, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_mask_zeroes_noise_and_leaves_its_size(norm):
    like, radius, seeds = torch.zeros(2, 2, 6, 50), torch.tensor([0.2, 0.3]), torch.tensor([8, 9])
    mask = torch.zeros(1, 1, 6, 1, dtype=torch.bool)
    mask[:, :, :2] = True
    whole, part = random_start(like, radius, norm, seeds), random_start(like, radius, norm, seeds, mask)
    assert part[:, :, 2:].abs().max() == 0
    if norm == "linf":
        assert torch.equal(part[:, :, :2], whole[:, :, :2])
    else:
        torch.testing.assert_close(perturbation_size(part, norm), perturbation_size(whole, norm))
    assert random_start(like, radius, norm, seeds, mask & False).abs().max() == 0


def test_noise_is_distributed_as_it_should_be():
    count, size = 2000, 200
    like, radius, seeds = torch.zeros(count, 1, size), torch.full((count,), 0.5), torch.arange(count)
    box = random_start(like, radius, "linf", seeds).double().flatten().numpy()
    assert kstest(box, "uniform", args=(-0.5, 1)).pvalue > 0.01
    assert abs(box.mean()) < 4 * 0.5 / math.sqrt(3 * box.size) and box.std() == pytest.approx(0.5 / math.sqrt(3), 0.01)
    ball = random_start(like, radius, "l2", seeds)
    share = perturbation_size(ball, "l2") / radius
    assert kstest(share.double().numpy(), "uniform").pvalue > 0.01, "sizes are uniform"
    # Divided by its size, each is a Gaussian direction: a coordinate is all but normal for so many.
    direction = (ball / perturbation_size(ball, "l2")[:, None, None]).double().flatten(1).numpy()
    assert kstest(direction.flatten(), "norm").pvalue > 0.01
    assert abs(direction.mean(1)).max() < 5 / math.sqrt(size)
    # Neighbours within and between samples have nothing to do with each other, to 4 standard deviations.
    for first, second in ((direction[:, :-1], direction[:, 1:]), (direction[:-1], direction[1:])):
        assert abs((first * second).mean()) < 4 / math.sqrt(first.size)
    assert abs(np.corrcoef(share[1:], share[:-1])[0, 1]) < 4 / math.sqrt(count)
    assert abs(np.corrcoef(share, direction[:, 0])[0, 1]) < 4 / math.sqrt(count), "size and direction"


def test_normal_numbers_are_standard_before_they_are_scaled():
    field = normal_field(torch.arange(100), 2001, torch.float64).numpy()
    assert kstest(field.flatten(), "norm").pvalue > 0.01
    # Each pair of uniform numbers makes two, which must be independent; so must their squares be, hence the radius.
    first, second = field[:, :-1:2].flatten(), field[:, 1::2].flatten()
    for a, b in ((first, second), (first**2, second**2)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(a.size)


def test_draws_of_seeds_follow_the_generator():
    first, again, other = (draw_seeds(5, torch.device("cpu"), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.dtype == torch.int64 and first.shape == (5,) and len(set(first.tolist())) == 5
    assert torch.equal(first, again) and not torch.equal(first, other)


# Masks, boxes, points between


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_masked_step_is_the_step_of_the_gradient_with_zeros(norm):
    delta, gradient = torch.randn(3, 2, 4, 5) * 0.1, torch.randn(3, 2, 4, 5)
    alpha, eps = torch.full((3,), 0.05), torch.full((3,), 0.1)
    for mask in (torch.rand(3, 2, 4, 5) < 0.5, torch.rand(1, 1, 4, 5) < 0.5, torch.rand(3, 1, 1, 1) < 2):
        ours, size = gradient_step(delta, gradient, alpha=alpha, eps=eps, norm=norm, mask=mask)
        expected, wanted = gradient_step(delta, gradient * mask, alpha=alpha, eps=eps, norm=norm)
        assert torch.equal(ours, expected) and torch.equal(size, wanted)
    # What is masked may be anything.
    gradient[0, 0, 0, 0] = math.nan
    mask = torch.ones(3, 2, 4, 5, dtype=torch.bool)
    mask[0, 0, 0, 0] = False
    ours, size = gradient_step(delta, gradient, alpha=alpha, eps=eps, norm=norm, mask=mask)
    assert ours.isfinite().all() and size.isfinite().all() and not torch.equal(ours[0], delta[0])


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_box_bounds_the_image_and_moves_what_lies_outside_no_further_out(norm):
    image = torch.rand(3, 1, 8, 8) * 1.4 - 0.2  # some voxels lie outside [0, 1] already
    delta, gradient = torch.zeros_like(image), torch.randn_like(image)
    alpha, eps = torch.full((3,), 0.5), torch.tensor([0.0, 0.3, 0.5])
    low, high = torch.tensor([0.0, 0.0, 0.2]), torch.tensor([1.0, 1.0, 0.6])
    free, size = gradient_step(delta, gradient, alpha=alpha, eps=eps, norm=norm)
    ours, same = gradient_step(delta, gradient, alpha=alpha, eps=eps, norm=norm, image=image, box=(low, high))
    assert torch.equal(size, same), "the box is no matter of the gradient"
    assert ours[0].abs().max() == 0
    assert (perturbation_size(ours, norm) <= eps * (1 + 1e-5)).all(), "it takes nothing out of the ball"
    for i in range(3):
        x, d, f = (each[i].flatten().tolist() for each in (image, ours, free))
        for value, moved, wanted in zip(x, d, f, strict=True):
            least, most = min(float(low[i]), value), max(float(high[i]), value)
            assert least - 1e-6 <= value + moved <= most + 1e-6
            assert moved == pytest.approx(min(max(wanted, least - value), most - value), abs=1e-6)
    everything = (torch.full((3,), -math.inf), torch.full((3,), math.inf))
    boxed, _ = gradient_step(delta, gradient, alpha=alpha, eps=eps, norm=norm, image=image, box=everything)
    assert torch.equal(boxed, free)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_interpolation_is_exact_at_both_ends_and_gives_the_size(norm):
    inner, outer = torch.randn(4, 2, 5, 3), torch.randn(4, 2, 5, 3)
    share = torch.tensor([0.0, 1.0, 0.25, 0.75])
    point, size = interpolate(inner, outer, share, norm)
    assert torch.equal(point[0], inner[0]) and torch.equal(point[1], outer[1])
    weight = share.double().view(4, 1, 1, 1)
    expected = (1 - weight) * inner.double() + weight * outer.double()
    torch.testing.assert_close(point.double(), expected, rtol=1e-6, atol=1e-6)
    assert size.dtype == torch.float32
    torch.testing.assert_close(size, perturbation_size(point, norm))


def test_ops_change_nothing_that_they_are_given():
    arguments = step_arguments()
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)] + list(arguments["box"])
    before = [t.clone() for t in tensors]
    call_step(arguments)
    interpolate(tensors[0], tensors[1], tensors[2], "l2")
    random_start(tensors[0], tensors[2], "linf", torch.tensor([1, 2]), tensors[4])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


# Registered operators


def samples():
    """Name of an operator -> arguments, in several layouts, dtypes and choices of what is optional."""
    for norm, space, dtype in itertools.product(
        ("l2", "linf"), ((7,), (4, 5), (3, 2, 4)), (torch.float32, torch.bfloat16)
    ):
        x, y = (torch.randn(2, 3, *space).to(dtype) for _ in range(2))
        one, mask, seeds = torch.ones(2), torch.rand(2, 1, *space) < 0.5, torch.tensor([3, 4])
        none = (None,) * 3
        yield "gradient_step", (x, y, one, one, norm, None, *none)
        yield "gradient_step", (x, y.float(), one, one, norm, mask, y, one * 0, one)
        yield "random_start", (x, one, norm, seeds, mask)
        yield "interpolate", (x, y, one * 0.3, norm)
        if len(space) > 1:
            last = torch.channels_last if len(space) == 2 else torch.channels_last_3d
            yield "gradient_step", (x.to(memory_format=last), y, one, one, norm, mask, *none)
            yield "gradient_step", (x, y.to(memory_format=last), one, one, norm, None, *none)
            turned = y.mT.contiguous().mT
            yield "gradient_step", (x[:, 1:], turned[:, 1:], one, one, norm, None, *none)
            yield "gradient_step", (turned, x, one, one, norm, None, *none)
            yield "random_start", (x.to(memory_format=last), one, norm, seeds, None)
            yield "interpolate", (x.to(memory_format=last), y, one * 0.3, norm)
    for labels, space, dtype in itertools.product(
        KINDS.values(), ((5,), (4, 5)), (torch.float32, torch.bfloat16, torch.float64)
    ):
        logits, raw = scene(labels, space, dtype=dtype)
        target = Target.from_raw(raw, labels)
        rest = (target.reference, target.known)
        layouts = [logits, logits.to(memory_format=torch.channels_last)] if len(space) == 2 else [logits]
        for each in layouts:
            yield "dice_ce", (each.requires_grad_(), *rest)
            yield "hard_counts", (each.detach(), *rest)
            loss, sums, voxels = torch.ops.ima_seg.dice_ce(each.detach(), *rest)
            yield "dice_ce_backward", (torch.ones_like(loss), each.detach(), *rest, sums, voxels)


@pytest.mark.parametrize(
    "name", ["gradient_step", "random_start", "interpolate", "dice_ce", "dice_ce_backward", "hard_counts"]
)
def test_operators_are_what_torch_was_told(name):
    given = [arguments for each, arguments in samples() if each == name]
    operator = getattr(torch.ops.ima_seg, name).default
    for arguments in given:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    # Tracing takes long: a few that differ in what is optional, dtype and layout.
    for arguments in (*given[:2], given[-1]):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_ops_compile_without_a_break_and_give_the_same(norm):
    target = Target.from_raw(torch.randint(0, 3, (2, 1, 6, 5)), Labels(3))
    weight = torch.randn(3, 1, 3, 3)

    def search(x, gradient, eps, seeds, mask, box):
        still = x.detach()  # the loss alone is differentiable
        delta = random_start(still, eps, norm, seeds, mask)
        stepped, size = gradient_step(delta, gradient, alpha=eps, eps=eps, norm=norm, mask=mask, image=still, box=box)
        point, length = interpolate(delta, stepped, eps, norm)
        logits = torch.nn.functional.conv2d(x + point, weight, padding=1)
        return dice_ce(logits, target), *hard_counts(logits, target), stepped, size, length

    x, gradient, eps = torch.randn(2, 1, 6, 5), torch.randn(2, 1, 6, 5), torch.full((2,), 0.1)
    rest = (gradient, eps, torch.tensor([3, 4]), torch.rand(1, 1, 6, 5) < 0.7, (eps * -10, eps * 10))
    found = []
    for function in (search, torch.compile(search, fullgraph=True, backend="aot_eager")):
        image = x.clone().requires_grad_()
        loss, *others = function(image, *rest)
        found.append([loss, *others, *torch.autograd.grad(loss.sum(), image)])
    assert found[0][-1].abs().max() > 0
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected)


def test_norms_dtypes_and_devices_that_do_not_fit_are_named():
    one, x = torch.ones(2), torch.zeros(2, 1, 4)
    with pytest.raises(UserError, match="'l1'; the norms there are: l2, linf"):
        gradient_step(x, x, alpha=one, eps=one, norm="l1")
    with pytest.raises(UserError, match=r"outer torch\.bfloat16"):
        interpolate(x, x.bfloat16(), one, "l2")
    with pytest.raises(UserError, match="not empty"):
        random_start(x[:0], one[:0], "l2", torch.zeros(0, dtype=torch.int64))
    regions = torch.zeros(2, 1, 4, dtype=torch.bool)
    with pytest.raises(UserError, match="known is on meta"):
        dice_ce(x, Target(regions, regions.to("meta"), Labels(1, True, 5)))


def test_interpolation_of_narrow_dtypes_is_rounded_once():
    inner, outer = torch.zeros(1, 1, 3, dtype=torch.bfloat16), torch.full((1, 1, 3), 100.0, dtype=torch.bfloat16)
    point, size = interpolate(inner, outer, torch.tensor([0.3]), "l2")
    assert point.dtype == torch.bfloat16 and size.item() == pytest.approx(30.0)
