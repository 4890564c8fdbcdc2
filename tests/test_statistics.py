import numpy as np
import pytest
from scipy import stats

from ima_seg.evaluate.measure.compare import holm, non_inferiority, paired
from ima_seg.evaluate.measure.statistics import (
    Estimate,
    area_under_dice,
    bootstrap_mean,
    median_breaking,
    pooled_dice,
    wilson,
)


def interval(estimate, low, high, n):
    return Estimate(estimate=estimate, low=low, high=high, n=n)


def test_bootstrap_mean_equals_scipy():
    values = np.random.default_rng(3).beta(5, 2, 30)
    ours = bootstrap_mean(values)
    rng = np.random.default_rng(0)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=9999, method="BCa", random_state=rng).confidence_interval
    assert ours is not None and ours.n == 30 and ours.estimate == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=2e-3)
    assert ours == bootstrap_mean(values)
    wide = bootstrap_mean(values, confidence=0.99)
    assert wide is not None and wide.low < ours.low < ours.estimate < ours.high < wide.high


def test_bootstrap_mean_covers():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(150):
        found = bootstrap_mean(rng.normal(0.7, 0.1, 25), resamples=999)
        hits += found.low <= 0.7 <= found.high
    assert 0.87 <= hits / 150 <= 0.99


@pytest.mark.filterwarnings("error")
def test_bootstrap_mean_of_few_values():
    assert bootstrap_mean([]) is None
    assert bootstrap_mean([0.3]) == interval(0.3, None, None, 1)
    assert bootstrap_mean([0.3] * 5) == interval(0.3, 0.3, 0.3, 5)
    two = bootstrap_mean([0.0, 1.0])
    assert two is not None and 0 <= two.low <= 0.5 <= two.high <= 1
    skewed = bootstrap_mean([0.0] * 9 + [1.0])
    assert skewed is not None and 0 <= skewed.low <= 0.1 <= skewed.high <= 1
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean([0.1, float("nan")])


def test_wilson():
    """The textbook formula, and bounds that stay inside 0 and 1."""
    n, k, z = 20, 3, stats.norm.ppf(0.975)
    centre = (k / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    result = wilson(k, n)
    assert result is not None and result.estimate == 0.15
    assert (result.low, result.high) == pytest.approx((centre - half, centre + half))
    none, everything = wilson(0, 10), wilson(10, 10)
    assert none is not None and none.low == 0 < none.high
    assert everything is not None and everything.low < 1 == everything.high
    assert wilson(0, 0) is None


def test_paired():
    rng = np.random.default_rng(0)
    a = rng.uniform(0.5, 0.8, 25)
    b = a + rng.normal(0.05, 0.05, 25)
    result = paired(a, b)
    assert result is not None and result.n == 25
    assert result.difference.estimate == pytest.approx((b - a).mean())
    assert result.difference.low < result.difference.estimate < result.difference.high
    assert result.p == pytest.approx(stats.wilcoxon(b, a).pvalue)
    swapped = paired(b, a)
    assert swapped is not None and swapped.p == pytest.approx(result.p)
    assert swapped.effect == pytest.approx(-result.effect)


@pytest.mark.filterwarnings("error")
def test_paired_by_hand():
    """Differences 0, 1, 2, -3: ranks 1, 2 up and 3 down, no effect; the exact two-sided p is 1."""
    result = paired([0, 0, 0, 0], [0, 1, 2, -3])
    assert result is not None and result.n == 4 and result.effect == 0 and result.p == 1
    rising = paired([0] * 5, [1, 2, 3, 4, 5])
    assert rising is not None and rising.effect == 1 and rising.p == pytest.approx(2 / 2**5)
    # 0.9 - 0.8 and 0.3 - 0.2 differ in the last bit and are a tie all the same.
    tied = paired([0.9, 0.2], [0.8, 0.3])
    assert tied is not None and tied.effect == 0


@pytest.mark.filterwarnings("error")
def test_paired_edges():
    same = paired([0.5, 0.6, 0.7], [0.5, 0.6, 0.7])
    assert same is not None and (same.p, same.effect) == (1.0, 0.0)
    assert same.difference == interval(0.0, 0.0, 0.0, 3)
    single = paired([0.5], [0.75])
    assert single is not None and (single.p, single.effect) == (1.0, 1.0)
    assert single.difference == interval(0.25, None, None, 1)
    assert paired([], []) is None
    with pytest.raises(ValueError, match="pairs"):
        paired([1.0], [])


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_non_inferiority():
    rng = np.random.default_rng(0)
    a = rng.uniform(0.8, 0.9, 40)
    b = a - 0.01 + rng.normal(0, 0.01, 40)
    result = non_inferiority(a, b, 0.02)
    assert result is not None and result.holds and result.n == 40
    t_bound = stats.t.interval(0.9, 39, (b - a).mean(), stats.sem(b - a))[0]  # one-sided 95 %
    assert result.lower == pytest.approx(t_bound, abs=5e-4)
    worse = non_inferiority(a, b, 0.005)
    assert worse is not None and not worse.holds
    single = non_inferiority([0.5], [0.6], 0.1)
    assert single is not None and single.lower is None and not single.holds
    assert non_inferiority([], [], 0.1) is None
    with pytest.raises(ValueError, match="margin"):
        non_inferiority(a, b, 0.0)


def test_area_under_dice():
    assert area_under_dice([0, 1], [0.8, 0.4]) == pytest.approx(0.6)
    assert area_under_dice([0, 1, 4], [1.0, 0.5, 0.5]) == pytest.approx((0.75 + 1.5) / 4)
    assert area_under_dice([0, 0.1, 5], [0.7, 0.7, 0.7]) == pytest.approx(0.7)
    for eps in ([0.0], [0.1, 0.2], [0.0, 0.0], [0.0, 2.0, 1.0]):
        with pytest.raises(ValueError, match="ascending"):
            area_under_dice(eps, [0.5] * len(eps))


def test_median_breaking():
    odd = median_breaking([3.0, 1.0, None])
    assert odd is not None and (odd.n, odd.broken, odd.median_rms) == (3, 2, 3.0)
    assert odd.low is None and odd.high is None  # too few cases for an interval
    assert median_breaking([1.0, 2.0, 3.0, 4.0]).median_rms == 2.5
    assert median_breaking([1.0, 2.0, None, None]).median_rms == 2.0
    assert median_breaking([1.0, None, None]).median_rms is None
    assert median_breaking([None]).median_rms is None
    assert median_breaking([]) is None
    # Tables of order statistics: n = 6 gives the extremes, n = 10 the second and ninth, n = 20 the sixth and 15th.
    for n, k in ((6, 1), (10, 2), (20, 6)):
        result = median_breaking(list(range(1, n + 1)))
        assert (result.low, result.high) == (k, n + 1 - k)
    censored = median_breaking([*range(1, 16), *[None] * 5])
    assert (censored.median_rms, censored.low, censored.high) == (10.5, 6, 15)
    censored = median_breaking([*range(1, 13), *[None] * 8])
    assert (censored.median_rms, censored.low, censored.high) == (10.5, 6, None)


def test_pooled_dice():
    assert pooled_dice([10, 0], [2, 3], [1, 4]) == pytest.approx(20 / 30)
    assert pooled_dice([0], [0], [0]) is None
    assert pooled_dice([], [], []) is None
    assert pooled_dice([0], [5], [0]) == 0
