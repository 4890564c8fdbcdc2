"""Random starts, and the generator behind them."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from ima_seg.errors import UserError
from ima_seg.ops import (
    draw_seeds,
    perturbation_size,
    random_start,
)
from ima_seg.ops.philox import normal_field, philox


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
