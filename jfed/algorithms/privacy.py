"""User-level central differential privacy: DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963).

What the server learns of a round is the sum of clipped messages with Gaussian noise; all that
follows is made of it, so any algorithm whose messages are like the variables can be private. What
it costs is told by the package `dp-accounting`.
"""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jfed.algorithms.algorithm import Algorithm, Client, Merged, Server, one_each
from jfed.algorithms.lengths import length
from jfed.algorithms.servers import ServerConfig
from jfed.errors import ConfigError, check_integer, check_number, check_share, one_of, optional
from jfed.models.model import Params

SAMPLINGS = ("poisson", "fixed")
ACCOUNTANTS = ("rdp", "pld")
# Folded into the server's key, which the algorithm has too.
_NOISE, _COUNT = (np.uint32(2**32 - i) for i in (8, 9))
# From how many clients there are and a generator to the numbers of those that train.
Draw = Callable[[int, np.random.Generator], np.ndarray]
_BELOW = "below"  # the part of a message that tells whether it was short enough


@dataclasses.dataclass(frozen=True)
class PrivacyConfig:
    """How private the clients are. None: not given.

    Attributes:
      clip: the L2 norm that a client's message is scaled down to; None for no privacy at all.
      noise: the standard deviation of the noise on the sum of messages, in units of `clip`.
      epsilon: in place of `noise`: the least noise that keeps to this after all rounds.
      delta: of the guarantee, above 0 and below 1; less than one over the number of clients.
      sampling: "poisson": each client takes part with the probability cohort / clients. "fixed":
        a cohort is drawn without replacement.
      accountant: "rdp" (Renyi) or "pld" (privacy loss distributions; tighter, Poisson only).
      quantile: adapt `clip`, which is then its first value, to this quantile of the messages' norms
        (Andrew et al. 2021, arXiv 1905.03871); the noise on their count is a twentieth of the
        cohort, and its price is in epsilon.
    """

    clip: float | None = None
    noise: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    sampling: str = "poisson"
    accountant: str = "rdp"
    quantile: float | None = None

    def __post_init__(self) -> None:
        one_of("dp_sampling", self.sampling, SAMPLINGS)
        one_of("dp_accountant", self.accountant, ACCOUNTANTS)
        if self.clip is None:
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)  # may be an array, which has no one truth value
                if value is not None and not (isinstance(value, str) and value == field.default):
                    raise ConfigError(f"dp_{field.name} {value!r} needs dp_clip, got none.")
            return
        numbers: dict[str, float] = {"clip": check_number("dp_clip", self.clip, above=0.0)}
        if self.noise is not None:
            numbers["noise"] = check_number("dp_noise", self.noise, least=0.0)
        if self.epsilon is not None:
            numbers["epsilon"] = check_number("dp_epsilon", self.epsilon, above=0.0)
        for name in ("delta", "quantile"):
            if (value := getattr(self, name)) is not None:
                numbers[name] = check_share(f"dp_{name}", value)
                if not 0 < numbers[name] < 1:
                    raise ConfigError(f"dp_{name} must be above 0 and below 1, got {value!r}.")
        for name, number in numbers.items():  # which may be given as arrays
            object.__setattr__(self, name, number)
        if (self.noise is None) == (self.epsilon is None):
            raise ConfigError(
                f"dp_clip needs one of dp_noise and dp_epsilon, got {self.noise!r} and "
                f"{self.epsilon!r}."
            )
        if self.delta is None:
            raise ConfigError("dp_clip needs dp_delta, such as 1e-5, got none.")
        if self.sampling == "fixed" and self.accountant == "pld":
            raise ConfigError("dp_accountant 'pld' cannot do dp_sampling 'fixed'; use 'rdp'.")


def private(
    algorithm: Algorithm,
    *,
    clip: float,
    noise: float,
    share: float,
    quantile: float | None = None,
    count_noise: float = 0.0,
) -> Algorithm:
    """An algorithm that gets of its clients' messages a noisy sum alone.

    All parts of a message together are scaled down to the norm `clip`, every client counts once,
    and the server gets (sum + noise) / (share * owners), where `owners` is how many clients of the
    federation own an entry, so that nothing depends on who took part. The factor that scales is
    rounded down to 8 bits, so that the levels of a codec before it stay evenly spaced.

    Tiers of unequal clients: a client that owns a part of the entries sends zeros in all others, so
    that it changes the sum by at most `clip` like any other, and all are as private. Each entry
    gets the same noise; where few own it, its mean is noisier.

    Args:
      algorithm: with messages of parts that are like the variables.
      clip: see `PrivacyConfig`.
      noise: likewise. Where the clip adapts, of the whole: the messages get
        (noise^-2 - (2 count_noise)^-2)^(-1/2) (Andrew et al., theorem 1).
      share: of the clients that takes part in a round, on average.
      quantile: see `PrivacyConfig`. In each round clip <- clip exp(-0.2 (below - quantile)), with
        `below` the noisy share of messages that were short enough.
      count_noise: the standard deviation of the noise on the count of these.

    Returns:
      Another algorithm; equal arguments give the same object.

    Raises:
      ConfigError: the algorithm is private already, or the count needs more noise than there is.
    """
    check_number("clip", clip, above=0.0)
    check_number("noise", noise, least=0.0)
    if not check_share("share", share) > 0:
        raise ConfigError(f"share must be above 0 and at most 1, got {share!r}.")
    if algorithm.is_private:
        raise ConfigError("the algorithm is private already.")
    scale = noise
    if quantile is not None and noise > 0:
        rest = noise**-2 - (2 * count_noise) ** -2 if count_noise else -1.0
        if rest <= 0:
            raise ConfigError(
                f"dp_quantile {quantile:g} counts the short messages with noise {count_noise:g}, a "
                f"twentieth of the cohort, which must be above half of the noise, {noise:g}; lower "
                "dp_noise, or raise the cohort."
            )
        scale = rest**-0.5
    return _private(algorithm, float(clip), scale, float(share), quantile, count_noise)


@functools.lru_cache(maxsize=64)
def _private(
    algorithm: Algorithm,
    clip: float,
    scale: float,
    share: float,
    quantile: float | None,
    count_noise: float,
) -> Algorithm:
    """As `private`, with the noise of the messages in place of that of the whole."""

    def own(client: Client) -> Client:
        return client._replace(sent=client.sent["sent"])

    def client_final(client: Client, local: Any, key: Array) -> tuple[dict[str, Any], Any]:
        message, memory = algorithm.client_final(own(client), local, key)
        if unlike := sorted(set(message) - set(algorithm.parts)):
            raise ConfigError(
                f"algorithm {algorithm.name!r} cannot be private: parts {unlike} of its message "
                "are not like the variables, so dp_clip has no norm of theirs."
            )
        message, bound = client.own(message), client.sent["clip"]
        norm = length(message)
        message = jax.tree.map(lambda u: u * _shorter(norm, bound), message)
        if quantile is not None:
            message |= {_BELOW: jnp.where(norm <= bound, 0.5, -0.5)}
        return message, memory

    def server_step(server: Server, merged: Merged) -> Server:
        state, bound = server.state
        expected = jax.tree.map(lambda n: share * n, merged.population)
        parts = dict(merged.message)
        below = parts.pop(_BELOW, None)

        def noisy(mean: Array, count: Array, whole: Array, key: Array) -> Array:
            total = mean * count + scale * bound * jax.random.normal(key, mean.shape)
            return jnp.where(whole > 0, total / jnp.where(whole > 0, whole, 1), 0)

        keys = _keys(jax.random.fold_in(merged.key, _NOISE), parts)
        message = {
            name: jax.tree.map(noisy, part, merged.owners, expected, keys[name])
            for name, part in parts.items()
        }
        clients = share * _most(merged.population)
        known = merged._replace(message=message, owners=expected, clients=clients)
        after = algorithm.server_step(server._replace(state=state), known)
        if below is not None and quantile is not None:
            drawn = jax.random.normal(jax.random.fold_in(merged.key, _COUNT))
            found = (below * merged.clients + count_noise * drawn) / clients + 0.5
            bound = bound * jnp.exp(-0.2 * (found - quantile))
        return Server(after.variables, (after.state, bound))

    def send(server: Server) -> Any:
        state, bound = server.state
        return {"sent": algorithm.send(server._replace(state=state)), "clip": bound}

    personal = algorithm.personalise
    return dataclasses.replace(
        algorithm,
        client_init=lambda client, *rest: algorithm.client_init(own(client), *rest),
        client_step=lambda client, *rest: algorithm.client_step(own(client), *rest),
        client_final=client_final,
        server_step=server_step,
        server_init=lambda variables: (algorithm.server_init(variables), jnp.float32(clip)),
        send=send,
        weights=dict.fromkeys((*algorithm.parts, *([_BELOW] if quantile else [])), one_each),
        personalise=personal and (lambda sent, memory: personal(sent["sent"], memory)),
        is_private=True,
        name=f"{algorithm.name}, private",
    )


class PrivateRounds(NamedTuple):
    """Of a federation.

    Attributes:
      algorithm: made private.
      cohort: how many clients a round has at most.
      draw: what draws them, see `poisson`; None for a draw of exactly so many.
      noise: as given, or found for the epsilon that was.
      epsilon: after so many rounds.
    """

    algorithm: Algorithm
    cohort: int
    draw: Draw | None
    noise: float
    epsilon: Callable[[int], float]


def private_rounds(
    algorithm: Algorithm, config: PrivacyConfig, clients: int, cohort: int | None, rounds: int
) -> PrivateRounds:
    """Makes the rounds of a federation private.

    Args:
      algorithm: see `private`.
      config: with a clip.
      clients: of the federation.
      cohort: how many of them take part in a round, on average; all by default.
      rounds: of the run.
    """
    assert config.clip is not None
    cohort = check_integer("cohort", clients if cohort is None else cohort, least=1, most=clients)
    accountant, share = Accountant(config, clients, cohort), cohort / clients
    noise = accountant.noise(rounds)
    algorithm = private(
        algorithm,
        clip=config.clip,
        noise=noise,
        share=share,
        quantile=config.quantile,
        count_noise=cohort / 20,
    )
    spent = functools.partial(accountant.epsilon, noise)
    if config.sampling == "fixed":
        return PrivateRounds(algorithm, cohort, None, noise, spent)
    return PrivateRounds(algorithm, most_drawn(clients, share), poisson(share), noise, spent)


def _shorter(norm: Float[Array, ""], bound: Float[Array, ""]) -> Float[Array, ""]:
    """The factor that brings a norm down to the bound, rounded down to 8 bits of mantissa."""
    factor = jnp.minimum(bound / jnp.where(norm > 0, norm, 1), 1)
    bits = jax.lax.bitcast_convert_type(factor, jnp.uint32) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _keys(key: Array, tree: Any) -> Any:
    """A key for each leaf."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))


def _most(population: Params) -> Float[Array, ""]:
    """How many clients a federation has: of the entries that all own."""
    return jnp.stack([leaf.max() for leaf in jax.tree.leaves(population)]).max()


class Accountant:
    """What a run has cost, by `dp-accounting`.

    Neighbours are federations that differ in one client: by its removal under Poisson sampling,
    by its replacement under a fixed cohort, which changes a sum by twice the clip.

    Args:
      config: with a clip.
      clients: of the federation, who can be sampled.
      cohort: of a round, on average.
    """

    def __init__(self, config: PrivacyConfig, clients: int, cohort: int) -> None:
        self._config, self._clients, self._cohort = config, clients, cohort
        self._library = optional("dp_accounting", "privacy")

    def epsilon(self, noise: float, rounds: int) -> float:
        """After so many rounds, at the configured delta; infinite without noise.

        Raises:
          ConfigError: so little noise that the tables of "pld" do not fit into memory.
        """
        if rounds == 0 or noise == 0:
            return math.inf if rounds else 0.0
        try:
            with _quiet():
                accountant = self._fresh()
                accountant.compose(self._event(noise, rounds))
                return float(accountant.get_epsilon(self._config.delta))
        except MemoryError as error:
            raise ConfigError(
                f"dp_accountant {self._config.accountant!r} runs out of memory at noise {noise:g}; "
                f"use 'rdp', or more noise: {error}."
            ) from error

    def noise(self, rounds: int) -> float:
        """The configured noise, or the least that keeps to the configured epsilon.

        Raises:
          ConfigError: no noise does.
        """
        library, target = self._library, self._config.epsilon
        if target is None:
            assert self._config.noise is not None
            self.epsilon(self._config.noise, rounds)  # which may be impossible to tell
            return self._config.noise
        enough = 1.0  # from below it would take "pld" tens of gigabytes
        while self.epsilon(enough, rounds) > target:
            enough *= 2
            if enough > 2**30:
                raise ConfigError(
                    f"dp_epsilon {target!r} cannot be reached in {rounds} rounds with dp_delta "
                    f"{self._config.delta!r}: noise {enough:g} is too little."
                )
        while self.epsilon(enough / 2, rounds) <= target:
            enough /= 2
        with _quiet():
            found = library.calibrate_dp_mechanism(
                self._fresh,
                lambda noise: self._event(noise, rounds),
                target,
                self._config.delta,
                library.ExplicitBracketInterval(enough / 2, enough),
                tol=1e-4 * enough,
            )
        return float(found)

    def _fresh(self) -> Any:
        relation = self._library.NeighboringRelation
        poisson = self._config.sampling == "poisson"
        kind = relation.ADD_OR_REMOVE_ONE if poisson else relation.REPLACE_ONE
        if self._config.accountant == "pld":
            return optional("dp_accounting.pld", "privacy").PLDAccountant(kind)
        return optional("dp_accounting.rdp", "privacy").RdpAccountant(neighboring_relation=kind)

    def _event(self, noise: float, rounds: int) -> Any:
        library = self._library
        if self._config.sampling == "poisson":
            share = self._cohort / self._clients
            one = library.PoissonSampledDpEvent(share, library.GaussianDpEvent(noise))
        else:
            one = library.SampledWithoutReplacementDpEvent(
                self._clients, self._cohort, library.GaussianDpEvent(noise / 2)
            )
        return library.SelfComposedDpEvent(one, rounds)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's warnings of orders that it leaves out."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_guarantee(
    config: PrivacyConfig,
    server: ServerConfig,
    clients: int,
    *,
    attacks: bool,
    late_by_message: bool = False,
) -> None:
    """Raises ConfigError for what would break the guarantee.

    Args:
      config: of the clients' privacy.
      server: how it weighs and merges.
      clients: of the federation.
      attacks: whether some send other messages than clipped ones.
      late_by_message: whether the bytes of one client's message tell who else is too late. (Who
        drops out, or is late by its own examples, is as one that sends zeros.)
    """
    if config.delta is not None and config.delta >= 1 / clients:
        raise ConfigError(
            f"dp_delta must be below one over the {clients} clients, or it may tell all of one of "
            f"them; got {config.delta!r}."
        )
    if late_by_message:
        raise ConfigError(
            "dp_clip cannot be with a deadline and codecs: bytes that are measured on one client's "
            "message would decide whether others are late."
        )
    check_sum(server, attacks=attacks)


def check_sum(server: ServerConfig, *, attacks: bool) -> None:
    """Raises ConfigError unless a private algorithm gets a sum of clipped messages.

    Args:
      server: how it weighs and merges.
      attacks: whether some clients send other messages than clipped ones.
    """
    if attacks:
        raise ConfigError(
            "dp_clip cannot be with exploding or hostile clients, which send what they do not clip."
        )
    if server.weights != "count":
        raise ConfigError(
            f"dp_clip needs weights 'count', got {server.weights!r}: a client's number of examples "
            "is its secret."
        )
    if server.aggregator != "mean":
        raise ConfigError(
            f"dp_clip needs the aggregator 'mean', got {server.aggregator!r}: noise is for sums."
        )


def poisson(share: float) -> Draw:
    """A draw of each client with the same probability."""

    def draw(clients: int, rng: np.random.Generator) -> np.ndarray:
        return np.flatnonzero(rng.random(clients) < share)

    return draw


def most_drawn(clients: int, share: float) -> int:
    """How many of the clients a Poisson draw may have, but for a chance of 1e-12."""
    from scipy.stats import binom  # half a second to import, which each command would take

    return int(min(clients, max(1, binom.isf(1e-12, clients, share))))
