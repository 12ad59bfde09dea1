"""How many examples each client gets, by shares drawn from a Dirichlet distribution."""

import numpy as np

from jfed.errors import ConfigError, check_integer, check_number

_EVEN = 1e9  # Dirichlet shares of a larger alpha are even, but overflow


def draw_counts(
    totals: np.ndarray,
    clients: int,
    alpha: float,
    min_examples: int,
    max_tries: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Splits each of `totals` `[K]` by Dirichlet shares, into counts `[K, clients]`."""
    check_number("alpha", alpha, above=0.0)
    check_integer("max_tries", max_tries, least=1)
    for _ in range(max_tries):
        shares = rng.dirichlet(np.full(clients, min(alpha, _EVEN)), len(totals))
        # Cutting at the rounded running shares keeps each sum, unlike rounding each share.
        inner = np.rint(np.cumsum(shares, axis=1)[:, :-1] * totals[:, None]).astype(np.int64)
        counts = np.diff(inner, axis=1, prepend=0, append=totals[:, None])
        if counts.sum(axis=0).min() >= min_examples:
            return counts
    raise ConfigError(
        f"{max_tries} draws with alpha {alpha} left one of {clients} clients below min_examples "
        f"{min_examples} each time. Raise alpha, or lower clients or min_examples."
    )
