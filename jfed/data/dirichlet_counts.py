"""How many examples each client gets, by shares drawn from a Dirichlet distribution."""

from collections.abc import Callable

import numpy as np

from jfed.errors import ConfigError, check_integer, check_number

# From totals `[K]`, the number of clients and alpha to counts `[K, clients]` with these totals.
Draw = Callable[[np.ndarray, int, float, np.random.Generator], np.ndarray]

_ALPHAS = (1e-200, 1e9)  # beyond, Dirichlet shares are 0 and 1, or even, but under- or overflow


def draw_counts(
    draw: Draw,
    totals: np.ndarray,
    clients: int,
    alpha: float,
    min_examples: int,
    max_tries: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draws counts `[K, clients]` of `totals` `[K]` until every client has `min_examples`."""
    check_number("alpha", alpha, above=0.0)
    check_integer("max_tries", max_tries, least=1)
    for _ in range(max_tries):
        counts = draw(totals, clients, np.clip(float(alpha), *_ALPHAS), rng)
        if counts.sum(axis=0).min() >= min_examples:
            return counts
    raise ConfigError(
        f"{max_tries} draws with alpha {alpha} left one of {clients} clients below min_examples "
        f"{min_examples} each time. Raise alpha, or lower clients or min_examples."
    )


def shared(totals: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """Splits each total by the clients' shares of it."""
    shares = rng.dirichlet(np.full(clients, alpha), len(totals))
    # Cutting at the rounded running shares keeps each sum, unlike rounding each share.
    inner = np.rint(np.cumsum(shares, axis=1)[:, :-1] * totals[:, None]).astype(np.int64)
    return np.diff(inner, axis=1, prepend=0, append=totals[:, None])


def balanced(
    totals: np.ndarray, clients: int, alpha: float, rng: np.random.Generator
) -> np.ndarray:
    """Splits one total after the other among the clients that are below the average so far.

    Li et al.'s code draws shares of all clients, sets those of the others to 0 and divides by the
    sum. That is the same distribution, but 0 / 0 where what remains is too small for a float.
    """
    counts = np.zeros((len(totals), clients), np.int64)
    for k in range(len(totals)):
        below = counts.sum(axis=0) * clients < totals.sum()
        counts[k, below] = shared(totals[k : k + 1], int(below.sum()), alpha, rng)
    return counts


def mixed(totals: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """Draws one client after the other a mixture of classes, and by it an equal number."""
    left, concentration = totals, alpha * totals / totals.sum()
    counts = []
    for size in np.diff(np.arange(clients + 1) * totals.sum() // clients).tolist():
        counts.append(_mixture(left, concentration, size, rng))
        left = left - counts[-1]
    return np.stack(counts, axis=1)


def _mixture(
    left: np.ndarray, concentration: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """A client's counts `[K]`, of those `left`; a class that runs out leaves its mixture."""
    counts = np.zeros_like(left)
    mixture = rng.dirichlet(concentration)
    while counts.sum() < size:
        there = counts < left
        if not mixture[there].any():  # shares too small for a float
            mixture[there] = rng.dirichlet(concentration[there])
        drawn = rng.multinomial(size - counts.sum(), mixture[there] / mixture[there].sum())
        counts[there] += np.minimum(drawn, (left - counts)[there])
    return counts
