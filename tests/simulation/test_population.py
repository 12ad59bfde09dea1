"""Who takes part in a round, and in which tier: against tables worked by hand."""

import numpy as np
import pytest

from jfed.algorithms.clients import ClientConfig
from jfed.errors import ConfigError
from jfed.simulation.population import make_population

SHARES = (0.5, 0.3, 0.2)
# Of a client whose own tier is that of the line: SHARES within reach, divided by their sum.
WITHIN = {
    0: ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    1: ((0.625, 0.375, 0), (0.5, 0.3, 0.2), (0, 0.6, 0.4)),
    2: (SHARES, SHARES, SHARES),
    2**70: (SHARES, SHARES, SHARES),
}


def _population(draw_tiers, *, shares=SHARES, clients=20, cohort=None, idle=0.0, seed=0):
    return make_population(
        tuple(np.arange(clients)[:, None]),
        tiers=len(shares),
        shares=shares,
        cohort=cohort,
        draw_tiers=draw_tiers,
        client=ClientConfig(),
        seed=seed,
        idle=idle,
    )


@pytest.mark.parametrize("draw_tiers", WITHIN)
def test_clients_draw_tiers_within_reach_by_the_shares(draw_tiers):
    population, rounds = _population(draw_tiers), 400
    drawn = np.zeros((20, 3))
    for number in range(rounds):
        for tier, clients in enumerate(population.sample(number)):
            drawn[clients, tier] += 1
    for own, expected in enumerate(WITHIN[draw_tiers]):
        found = drawn[population.tier == own].sum(0)
        total = rounds * (population.tier == own).sum()
        assert found.sum() == total
        expected = np.asarray(expected)
        # Five standard deviations; exactly none where the tier is out of reach.
        spread = 5 * np.sqrt(expected * (1 - expected) / total)
        assert np.all(np.abs(found / total - expected) <= spread)


def test_a_draw_depends_on_the_seed_the_round_and_the_client_alone():
    def tiers(population, number):
        sampled = enumerate(population.sample(number))
        return {client: tier for tier, clients in sampled for client in clients.tolist()}

    everybody, some = _population(1), _population(1, cohort=7)
    in_order = [tiers(everybody, number) for number in range(6)]
    assert [tiers(_population(1), number) for number in reversed(range(6))] == in_order[::-1]
    for number in range(6):
        assert tiers(some, number).items() <= in_order[number].items()
    assert len({tuple(sorted(drawn.items())) for drawn in in_order}) == 6
    assert tiers(_population(1, seed=1), 0) != in_order[0]


@pytest.mark.parametrize("draw_tiers", WITHIN)
def test_clients_without_a_tier_draw_none(draw_tiers):
    population = _population(draw_tiers, idle=0.4)
    able = np.flatnonzero(population.tier < 3)
    assert len(able) == 12
    for number in range(5):
        np.testing.assert_array_equal(np.sort(np.concatenate(population.sample(number))), able)


def test_the_most_clients_of_a_program_are_those_within_reach():
    """Of 20 clients 8 are idle; the others are 6, 4 and 2 (largest remainders of .5, .3 and .2)."""
    groups = [(0,), (1,), (2,), (0, 2), (0, 1, 2)]
    most = {d: [_population(d, idle=0.4).most(group) for group in groups] for d in WITHIN}
    assert most == {
        0: [6, 4, 2, 8, 12],
        1: [10, 12, 6, 12, 12],
        2: [12] * 5,
        2**70: [12] * 5,
    }
    few = _population(1, idle=0.4, cohort=7)
    assert [few.most(group) for group in groups] == [7, 7, 6, 7, 7]


@pytest.mark.parametrize("draw_tiers", [True, False, -1])
def test_a_reach_that_cannot_be_is_refused(draw_tiers):
    with pytest.raises(ConfigError, match=f"draw_tiers must be .*0 or more, got {draw_tiers}"):
        _population(draw_tiers)


def test_a_reach_needs_another_tier():
    with pytest.raises(ConfigError, match="draw_tiers 2 needs another tier to draw, there is one"):
        _population(2, shares=(1.0,))
    assert _population(2, shares=(1.0,), idle=0.5).draw_tiers == 2  # none at all is drawn too
