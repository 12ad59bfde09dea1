"""Who takes part in a round, in which tier, and what each client does: host work, in NumPy."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jfed import tiers as tiers_lib
from jfed.algorithms.clients import ClientConfig
from jfed.engine.faults import (
    FaultConfig,
    draw_fate,
    hostile_clients,
    straggler_batches,
)
from jfed.engine.packing import Work, client_batches, client_steps
from jfed.errors import ConfigError, calling, check_integer, name_of, shown
from jfed.seeds import generator

# From the round (from 0) and a generator of its own to the numbers of the clients that train.
Sampler = Callable[[int, np.random.Generator], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Population:
    """All clients of a federation.

    Attributes:
      partition: the examples of each client.
      tier: `[clients]` which tier each belongs to; the number of tiers for those without one.
      shares: `[tiers + 1]` of the clients, summing to 1; the last is of those without a tier.
      cohort: how many train in a round; at most, if a sampler draws them.
      sampler: `(round, rng) -> numbers of clients` in place of a draw without replacement.
      weights: of each client in the mean.
      draw_tiers: a sampled client draws its tier, by `shares`, among those at most so many places
        from its own; 0: it keeps its own.
      client: how each trains.
      seed: of the sampling, of the order of examples and of faults.
      faults: what goes wrong with clients.
      hostile: `[clients]` which of them attack.
    """

    partition: Sequence[np.ndarray]
    tier: np.ndarray
    shares: np.ndarray
    cohort: int
    sampler: Sampler | None
    weights: Sequence[float]
    draw_tiers: int
    client: ClientConfig
    seed: int
    faults: FaultConfig
    hostile: np.ndarray

    def sample(self, number: int) -> list[np.ndarray]:
        """The cohort of a round: for each tier its clients, in ascending order.

        Sampled clients without a tier are left out.
        """
        rng = generator(self.seed, "cohort", number)
        if self.sampler is None:
            cohort = rng.choice(len(self.partition), self.cohort, replace=False)
        else:
            with calling(f"sampler {name_of(self.sampler)}", round=number):
                drawn = self.sampler(number, rng)
            cohort = check_sample(self.sampler, number, drawn, len(self.partition), self.cohort)
        tier = np.array([self._tier(number, client) for client in cohort.tolist()], int)
        return [np.sort(cohort[tier == i]) for i in range(len(self.shares) - 1)]

    def _tier(self, number: int, client: int) -> int:
        """The tier of a client in a round, which depends on these two alone."""
        own, tiers = int(self.tier[client]), len(self.shares) - 1
        if not self.draw_tiers or own == tiers:
            return own
        reach = self.within_reach(client)
        shares = self.shares[reach.start : reach.stop]
        rng = generator(self.seed, "tier", number, client)
        return reach.start + int(rng.choice(len(shares), p=shares / shares.sum()))

    def within_reach(self, client: int) -> range:
        """The tiers that a client with a tier may be in."""
        own, last = int(self.tier[client]), len(self.shares) - 2
        return range(max(0, own - self.draw_tiers), min(last, own + self.draw_tiers) + 1)

    def work(self, number: int, cohort: Sequence[np.ndarray]) -> list[list[Work]]:
        """What the clients of each tier do in a round, except those that drop out.

        Depends on the client and the round alone.
        """
        return [
            [
                w
                for client in clients.tolist()
                if (w := self._work(number, client, tier)) is not None
            ]
            for tier, clients in enumerate(cohort)
        ]

    def _work(self, number: int, client: int, tier: int) -> Work | None:
        examples = self.partition[client]
        rng = generator(self.seed, "batches", number, client)
        batches = client_batches(examples, self.client, rng)
        hostile = bool(self.hostile[client])
        fate = draw_fate(self.faults, number, client, hostile=hostile, seed=self.seed)
        if fate.drops:
            return None
        if fate.straggles:
            batches = batches[: straggler_batches(self.faults, len(batches))]
        return Work(client, tier, batches, len(examples), self.weights[client], fate.fault)

    def alone(self, number: int, client: int, tier: int) -> Work:
        """What a client would do in a round, of weight 1, where nothing goes wrong with it."""
        examples = self.partition[client]
        rng = generator(self.seed, "batches", number, client)
        return Work(client, tier, client_batches(examples, self.client, rng), len(examples), 1.0)

    def most(self, tiers: Sequence[int]) -> int:
        """The most clients that train some of the tiers in one round."""
        able = self.tier < len(self.shares) - 1
        near = np.abs(self.tier[:, None] - np.asarray(tiers)).min(1) <= self.draw_tiers
        return min(self.cohort, int((able & near).sum()))

    def able(self) -> tuple[np.ndarray, ...]:
        """Numbers, examples, steps and weights of all clients that have a tier."""
        own = np.flatnonzero(self.tier < len(self.shares) - 1)
        examples = np.asarray([len(self.partition[client]) for client in own.tolist()], np.int32)
        steps = np.asarray(self.steps(), np.int32)[own]
        return own.astype(np.int32), examples, steps, np.asarray(self.weights, np.float32)[own]

    def steps(self) -> list[int]:
        """How many batches each client trains on in a round."""
        return [client_steps(len(examples), self.client) for examples in self.partition]


def check_sample(
    sampler: Sampler, number: int, drawn: Any, clients: int, cohort: int
) -> Int[np.ndarray, " cohort"]:
    """A sampler's clients as an array; ConfigError if one is not there, or drawn twice."""
    title = f"sampler {name_of(sampler)}, asked for round {number} (from 0),"
    try:
        found = np.asarray(drawn)
    except ValueError as error:  # lists of different lengths
        raise ConfigError(f"{title} must return numbers of clients, got {shown(drawn)}.") from error
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ConfigError(f"{title} must return numbers of clients, got {shown(drawn)}.")
    for client in found.tolist():
        if not 0 <= client < clients:
            raise ConfigError(f"{title} returned client {client}, of clients 0 to {clients - 1}.")
    if len(set(found.tolist())) < len(found):
        twice = next(c for c in found.tolist() if (found == c).sum() > 1)
        raise ConfigError(f"{title} returned client {twice} twice.")
    if len(found) > cohort:
        raise ConfigError(f"{title} returned {len(found)} clients, of a cohort of {cohort}.")
    return found.astype(np.int64)


def make_population(
    partition: Sequence[Any],
    *,
    tiers: int,
    shares: Sequence[float] | None,
    cohort: int | None,
    draw_tiers: int,
    client: ClientConfig,
    seed: int,
    sampler: Sampler | None = None,
    weights: Sequence[float] | None = None,
    idle: float = 0.0,
    faults: FaultConfig | None = None,
) -> Population:
    """Checks the settings and assigns tiers; see `jfed.simulate` for the arguments.

    `idle` is the share of clients without a tier, see `Tiers`.
    """
    clients = len(partition)
    cohort = check_integer("cohort", clients if cohort is None else cohort, least=1)
    if cohort > clients:
        raise ConfigError(f"cohort must be at most the {clients} clients, got {cohort}.")
    draw_tiers = check_integer("draw_tiers", draw_tiers, least=0)
    if draw_tiers and tiers == 1 and not idle:
        raise ConfigError(f"draw_tiers {draw_tiers} needs another tier to draw, there is one.")
    faults = faults or FaultConfig()
    return Population(
        partition=partition,
        tier=tiers_lib.assign(clients, tiers, shares, seed=seed, idle=idle),
        shares=tiers_lib.with_idle(tiers_lib.check_shares(shares, tiers), idle),
        cohort=cohort,
        sampler=sampler,
        weights=[float(len(p)) for p in partition] if weights is None else weights,
        draw_tiers=draw_tiers,
        client=client,
        seed=seed,
        faults=faults,
        hostile=hostile_clients(faults, clients, seed=seed),
    )
