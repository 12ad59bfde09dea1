"""Who takes part in a round, in which tier, and what each client does: host work, in NumPy."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jfed import tiers as tiers_lib
from jfed.engine.client import ClientConfig
from jfed.engine.faults import (
    FaultConfig,
    draw_fate,
    hostile_clients,
    straggler_batches,
)
from jfed.engine.packing import Work, capacity, client_batches, client_steps
from jfed.errors import ConfigError, check_integer
from jfed.seeds import generator


@dataclasses.dataclass(frozen=True, eq=False)
class Population:
    """All clients of a federation.

    Attributes:
      partition: the examples of each client.
      tier: `[clients]` which tier each belongs to; the number of tiers for those without one.
      shares: `[tiers + 1]` of the clients, summing to 1; the last is of those without a tier.
      cohort: how many train in a round.
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
        cohort = rng.choice(len(self.partition), self.cohort, replace=False)
        tier = np.array([self._tier(number, client) for client in cohort.tolist()])
        return [np.sort(cohort[tier == i]) for i in range(len(self.shares) - 1)]

    def _tier(self, number: int, client: int) -> int:
        """The tier of a client in a round, which depends on these two alone."""
        own, tiers = int(self.tier[client]), len(self.shares) - 1
        if not self.draw_tiers or own == tiers:
            return own
        first, last = max(0, own - self.draw_tiers), min(tiers - 1, own + self.draw_tiers)
        shares = self.shares[first : last + 1]
        rng = generator(self.seed, "tier", number, client)
        return first + int(rng.choice(len(shares), p=shares / shares.sum()))

    def work(self, number: int, clients: np.ndarray) -> list[Work]:
        """What clients do in a round, except those that drop out.

        Depends on the client and the round alone.
        """
        work = [self._work(number, client) for client in clients.tolist()]
        return [item for item in work if item is not None]

    def _work(self, number: int, client: int) -> Work | None:
        examples = self.partition[client]
        rng = generator(self.seed, "batches", number, client)
        batches = client_batches(examples, self.client, rng)
        hostile = bool(self.hostile[client])
        fate = draw_fate(self.faults, number, client, hostile=hostile, seed=self.seed)
        if fate.drops:
            return None
        if fate.straggles:
            batches = batches[: straggler_batches(self.faults, len(batches))]
        return Work(client, batches, float(len(examples)), fate.fault)

    def slots(self, tier: int) -> int:
        """The most clients that train a tier in one round."""
        able = self.tier < len(self.shares) - 1
        near = np.abs(self.tier - tier) <= self.draw_tiers
        return min(self.cohort, int((able & near).sum()))

    def capacity(self, lanes: int) -> int:
        """The most steps that one of so many lanes does in any round."""
        steps = [client_steps(len(examples), self.client) for examples in self.partition]
        return capacity(steps, self.cohort, lanes)


def make_population(
    partition: Sequence[Any],
    *,
    tiers: int,
    shares: Sequence[float] | None,
    cohort: int | None,
    draw_tiers: int,
    client: ClientConfig,
    seed: int,
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
    faults = faults or FaultConfig()
    return Population(
        partition=partition,
        tier=tiers_lib.assign(clients, tiers, shares, seed=seed, idle=idle),
        shares=tiers_lib.with_idle(tiers_lib.check_shares(shares, tiers), idle),
        cohort=cohort,
        draw_tiers=draw_tiers,
        client=client,
        seed=seed,
        faults=faults,
        hostile=hostile_clients(faults, clients, seed=seed),
    )
