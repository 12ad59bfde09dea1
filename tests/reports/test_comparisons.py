"""Differences against SciPy's paired test, Holm's procedure against the closed test behind it."""

import itertools

import numpy as np
import pytest
from scipy import stats

from jfed.reports.comparisons import difference, rejected, told


def test_differences_are_a_paired_test_by_seed():
    ours, theirs = {0: 0.61, 2: 0.66, 1: 0.58, 7: 0.1}, {1: 0.57, 0: 0.58, 2: 0.64}
    found = difference(ours, theirs)
    assert found.mean == pytest.approx(2)
    assert found.deviation == pytest.approx(1)
    expected = stats.ttest_rel([0.61, 0.58, 0.66], [0.58, 0.57, 0.64]).pvalue
    assert found.p == pytest.approx(expected, rel=1e-6)
    assert difference(ours, {3: 0.5}) is None


def _closed(p, level):
    """Rejected if every set of hypotheses with it is, by Bonferroni (Marcus et al. 1976)."""
    places = range(len(p))
    sets = [s for n in range(1, len(p) + 1) for s in itertools.combinations(places, n)]
    return [all(min(p[j] for j in s) * len(s) < level for s in sets if i in s) for i in places]


@pytest.mark.parametrize("seed", range(20))
def test_holm_is_a_closed_test(seed):
    rng = np.random.default_rng(seed)
    p = (rng.uniform(size=6) ** rng.integers(1, 6, size=6)).tolist()
    assert rejected(p, 0.1) == _closed(p, 0.1)


def test_noise_alone_seldom_gives_a_star():
    """Of 400 tables of ten differences of noise, one in twenty may have one; 11 % is 5 sigma up."""
    rng = np.random.default_rng(0)
    stars = 0
    for _ in range(400):
        noise = rng.normal(size=(10, 2, 3))
        pairs = [difference(*(dict(enumerate(x)) for x in pair)) for pair in noise]
        stars += any("*" in text for text in told(pairs))
    assert 0 < stars < 44


def test_how_differences_are_told():
    one, none = difference({0: 0.5}, {0: 0.4}), difference({0: 0.5}, {1: 0.4})
    exact = difference({0: 0.57, 1: 0.58}, {0: 0.56, 1: 0.57})
    same = difference({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6})
    assert told([one, none, exact, same]) == ["+10.00", "", "+1.00 ± 0.00 *", "+0.00 ± 0.00"]


def test_a_star_of_one_test_is_lost_among_many():
    """6, 5 and 10 points, p = 0.045: alone with a star, beside ten of noise without."""
    found = difference({0: 0.56, 1: 0.55, 2: 0.6}, dict.fromkeys(range(3), 0.5))
    noise = difference({0: 0.5, 1: 0.52, 2: 0.49}, dict.fromkeys(range(3), 0.5))
    assert told([found]) == ["+7.00 ± 2.65 *"]
    assert told([found, *[noise] * 10])[0] == "+7.00 ± 2.65"
