"""Clients that fail or attack: who does, decided on the host, and what they send instead.

Dropping out and straggling change a client's work; the rest corrupts its update where it is
finished, by an integer code that travels with the work.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jfed.errors import ConfigError, check_number, check_share, one_of
from jfed.models.model import Params
from jfed.seeds import generator

ATTACKS = ("sign-flip", "noise", "scaled")
HONEST, NON_FINITE, EXPLODING = 0, 1, 2
_FIRST_ATTACK = 3  # the code of `ATTACKS[0]`


@dataclasses.dataclass(frozen=True)
class FaultConfig:
    """Which clients fail, how often, and what they do then.

    `dropout`, `non_finite` and `exploding` are drawn anew for each sampled client in each round,
    and exclude each other; `stragglers` are drawn beside them. Which clients are hostile is drawn
    once; they attack in every round that they do not drop out of, and do nothing else.

    Attributes:
      dropout: share of the sampled clients that get the model and send nothing.
      stragglers: share of the sampled clients that do only part of their steps. Their update weighs
        as much as a whole one.
      straggler_steps: that part, above 0 and at most 1; at least one step is done.
      non_finite: share of the sampled clients whose update is not a number. Such updates are always
        left out of the model, simulated or not.
      exploding: share of the sampled clients that send `explosion` times their update.
      explosion: see `exploding`.
      hostile: share of all clients that attack, rounded to a number of clients.
      attack: what hostile clients send. "sign-flip": the negative of their update; "noise":
        Gaussian noise of standard deviation `attack_noise` in its place; "scaled": `attack_scale`
        times their update.
      attack_noise: see `attack`.
      attack_scale: see `attack`.
    """

    dropout: float = 0.0
    stragglers: float = 0.0
    straggler_steps: float = 0.5
    non_finite: float = 0.0
    exploding: float = 0.0
    explosion: float = 1e6
    hostile: float = 0.0
    attack: str = "sign-flip"
    attack_noise: float = 1.0
    attack_scale: float = 10.0

    def __post_init__(self) -> None:
        names = ("dropout", "non_finite", "exploding", "hostile")
        shares = {name: check_share(name, getattr(self, name)) for name in names}
        check_share("stragglers", self.stragglers)
        exclusive = sum(share for name, share in shares.items() if name != "hostile")
        if exclusive > 1 + 1e-9:
            raise ConfigError(
                f"dropout, non_finite and exploding must sum to at most 1, got {shares}."
            )
        if check_share("straggler_steps", self.straggler_steps) == 0:
            raise ConfigError(
                f"straggler_steps must be above 0 and at most 1, got {self.straggler_steps!r}; "
                "clients that do nothing are a matter of dropout."
            )
        one_of("attack", self.attack, ATTACKS)
        check_number("explosion", self.explosion, above=0.0)
        check_number("attack_noise", self.attack_noise, above=0.0)
        check_number("attack_scale", self.attack_scale)

    @property
    def corrupts(self) -> bool:
        """Whether any client may send something else than what it trained."""
        return max(self.non_finite, self.exploding, self.hostile) > 0


class Fate(NamedTuple):
    """What happens to one client in one round: `fault` is the code of what it sends."""

    drops: bool
    straggles: bool
    fault: int


def hostile_clients(
    config: FaultConfig, clients: int, *, seed: int
) -> Bool[np.ndarray, " clients"]:
    """Which clients attack: the given share of them, to the nearest number.

    Raises:
      ConfigError: a share above 0 that amounts to no client.
    """
    count = round(config.hostile * clients)
    if config.hostile and not count:
        raise ConfigError(f"hostile {config.hostile!r} of {clients} clients are none.")
    return generator(seed, "hostile").permutation(clients) < count


def draw_fate(config: FaultConfig, round_: int, client: int, *, hostile: bool, seed: int) -> Fate:
    """A client's fate in a round; depends on the seed, the round and the client alone."""
    fault, straggler = generator(seed, "faults", round_, client).random(2)
    ends = np.cumsum([config.dropout, config.non_finite, config.exploding])
    drops, not_finite, explodes = fault < ends
    code = NON_FINITE if not_finite else EXPLODING if explodes else HONEST
    if hostile:
        code = _FIRST_ATTACK + ATTACKS.index(config.attack)
    return Fate(bool(drops), bool(straggler < config.stragglers), code)


def straggler_batches(config: FaultConfig, steps: int) -> int:
    """How many of its steps a straggler does."""
    return max(1, round(config.straggler_steps * steps))


def corrupt(config: FaultConfig, update: Params, fault: Int[Array, ""], key: Array) -> Params:
    """What a client with that fault sends in place of its update.

    Args:
      config: strengths.
      update: what it trained.
      fault: its code.
      key: of the noise; consumed.
    """

    def times(factor: float) -> Params:
        return jax.tree.map(lambda u: u * jnp.asarray(factor, u.dtype), update)

    def noise() -> Params:
        leaves, structure = jax.tree.flatten(update)
        keys = jax.random.split(key, len(leaves))
        drawn = [
            jnp.asarray(config.attack_noise, u.dtype) * jax.random.normal(k, u.shape, u.dtype)
            for k, u in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, drawn)

    attacks = {
        "sign-flip": lambda: times(-1.0),
        "noise": noise,
        "scaled": lambda: times(config.attack_scale),
    }
    failures = (lambda: update, lambda: times(jnp.nan), lambda: times(config.explosion))
    return jax.lax.switch(fault, (*failures, *(attacks[name] for name in ATTACKS)))
