"""Arms compared seed by seed, and which of several differences noise does not explain."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.05  # how often noise alone may give any of the differences told together a star


class Difference(NamedTuple):
    """Of two arms, paired by seed, in points.

    Attributes:
      mean: over seeds.
      deviation: standard deviation; None of a single seed.
      p: two-sided, of a paired t-test; None of a single seed.
    """

    mean: float
    deviation: float | None = None
    p: float | None = None


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """The difference of shares by seed; None where no seed is in both."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    points = np.round([100 * (ours[seed] - theirs[seed]) for seed in seeds], 9)
    mean = float(points.mean())
    if len(seeds) == 1:
        return Difference(mean)
    deviation = float(points.std(ddof=1))
    if not deviation:
        return Difference(mean, deviation, 1.0 if mean == 0 else 0.0)
    from scipy.stats import t  # half a second to import, which each command would take

    statistic = abs(mean) / (deviation / np.sqrt(len(seeds)))
    return Difference(mean, deviation, float(2 * t.sf(statistic, len(seeds) - 1)))


def rejected(p: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Which hypotheses Holm's step-down procedure rejects (Scandinavian J. of Statistics 6, 1979).

    The probability of rejecting any that is true is at most `level`, however the tests depend on
    each other.
    """
    found, order = [False] * len(p), np.argsort(p, kind="stable").tolist()
    for rank, place in enumerate(order):
        if p[place] * (len(p) - rank) >= level:
            break
        found[place] = True
    return found


def told(differences: Sequence[Difference | None]) -> list[str]:
    """Differences that are told together as text, a star at those that `rejected` finds.

    Mean and standard deviation; nothing for None, and no deviation or star of a single seed.
    """
    tested = [d.p for d in differences if d is not None and d.p is not None]
    stars = iter(rejected(tested))
    found = []
    for d in differences:
        if d is None:
            found.append("")
        elif d.p is None:
            found.append(f"{d.mean:+.2f}")
        else:
            found.append(f"{d.mean:+.2f} ± {d.deviation:.2f}{' *' * next(stars)}")
    return found
