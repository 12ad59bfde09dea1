"""Algorithms in which some leaves of the model never leave their client: FedPer, FedRep, FedBN."""

import dataclasses
import fnmatch
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jfed.algorithms.algorithm import Algorithm, Client
from jfed.algorithms.averaging import fedavg
from jfed.algorithms.clients import ClientConfig, make_optimizer
from jfed.algorithms.servers import ServerConfig
from jfed.algorithms.sharing import shared
from jfed.algorithms.training import Local, local_training
from jfed.errors import ConfigError, check_sequence, check_share
from jfed.models.model import Params, by_name, path_name
from jfed.models.named_parameters import chosen
from jfed.tiers.parts import map_parts

CLASSIFIERS = ("*classifier*",)  # of jfed's networks
NORMS = ("*norm*",)


@shared
def fedper(
    client: ClientConfig, server: ServerConfig, *, personal: tuple[str, ...] = CLASSIFIERS
) -> Algorithm:
    """FedPer (Arivazhagan et al. 2019, arXiv 1912.00818, algorithm 1): personal last layers.

    A client trains its own personal leaves, its memory, together with the global rest; the rest is
    averaged. What is personal is neither sent nor counted as traffic, and stays in the global model
    as it began, so that personal accuracy is what tells (`local_test`).

    Args:
      client: the clients' optimizer.
      server: the server's optimizer.
      personal: shell patterns of the paths of leaves, such as "classifier/*"; by default those of
        the classifiers of jfed's networks. Tiers that keep something per depth have it under
        "own/", the rest under "shared/".
    """
    given = check_sequence("personal", personal)
    if not given or not all(isinstance(pattern, str) for pattern in given):
        raise ConfigError(
            f"personal must be one pattern or more, such as 'classifier/*', got {personal!r}."
        )
    inner = fedavg(client, server)

    def start(client: Client, memory: Params) -> Params:
        return pick(personal, memory, client.sent)

    def client_final(client: Client, local: Local, key: Array) -> tuple[dict[str, Any], Params]:
        return inner.client_final(client, local, key)[0], local.params

    def memory_init(variables: Params) -> Params:
        check_some(personal, variables)
        return variables

    return dataclasses.replace(
        inner,
        **local_training(make_optimizer(client), start=start)._asdict(),
        client_final=client_final,
        memory_init=memory_init,
        personal=functools.partial(is_personal, personal),
        personalise=lambda sent, memory: pick(personal, memory, sent),
    )


@shared
def fedrep(
    client: ClientConfig,
    server: ServerConfig,
    *,
    personal: tuple[str, ...] = CLASSIFIERS,
    head_share: float = 0.5,
) -> Algorithm:
    """FedRep (Collins et al. 2021, arXiv 2102.07078, algorithm 1): first the head, then the rest.

    As `fedper`, but a client first trains its personal leaves alone, from where they are, and then
    the others alone. The paper has so many head updates, then one of the representation; its
    experiments ten epochs and one, `head_share=10 / 11`. After three rounds equal to the authors'
    code (lgcollins/FedRep, d82e629) to 9e-7 of the weights' change, where a client that was not
    sampled before begins with the first head; their code lets it begin with the others' mean.

    Args:
      client: the clients' optimizer. Its state of leaves that are not trained stays.
      server: the server's optimizer.
      personal: as of `fedper`.
      head_share: of the batches of a round, rounded, those that train the personal leaves.
    """
    check_share("head_share", head_share)
    inner = fedper(client, server, personal=personal)

    def client_step(
        client: Client, local: tuple[Local, Array], batch: Any, key: Array
    ) -> tuple[tuple[Local, Array], Any]:
        before, step = local
        after, metrics = inner.client_step(client, before, batch, key)
        first = jnp.round(head_share * client.steps.astype(jnp.float32)).astype(jnp.int32)
        is_head: Bool[Array, ""] = step < first

        def trained(new: Params, old: Params) -> Params:
            head, rest = (
                jax.tree.map(lambda a, b, w=w: jnp.where(w, a, b), new, old)
                for w in (is_head, ~is_head)
            )
            return pick(personal, head, rest)

        params, state = (
            map_parts(trained, before.params, *pair)
            for pair in ((after.params, before.params), (after.optimizer, before.optimizer))
        )
        return (after._replace(params=params, optimizer=state), step + 1), metrics

    return dataclasses.replace(
        inner,
        client_init=lambda *given: (inner.client_init(*given), jnp.int32(0)),
        client_step=client_step,
        client_final=lambda client, local, key: inner.client_final(client, local[0], key),
    )


@shared
def fedbn(
    client: ClientConfig, server: ServerConfig, *, personal: tuple[str, ...] = NORMS
) -> Algorithm:
    """FedBN (Li et al. 2021, arXiv 2102.07623): scales and offsets of norms stay at their client.

    So do their statistics: personal models are tested with those of the client's own examples.

    Args:
      client: the clients' optimizer.
      server: the server's optimizer.
      personal: as of `fedper`; by default the norms of jfed's networks.
    """
    return fedper(client, server, personal=personal)


def pick(personal: tuple[str, ...], own: Params, common: Params) -> Params:
    """The personal leaves of one tree, all others of the other."""
    return jax.tree_util.tree_map_with_path(
        lambda path, mine, theirs: mine if is_personal(personal, path_name(path)) else theirs,
        own,
        common,
    )


def is_personal(patterns: tuple[str, ...], path: str) -> bool:
    """Whether a path is like one of the patterns."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def check_some(patterns: tuple[str, ...], variables: Params) -> None:
    """Raises ConfigError if a pattern names no leaf, or all together name every one."""
    paths = tuple(by_name(variables))
    if len(chosen(patterns, paths, title="personal")) == len(paths):
        raise ConfigError(f"personal {patterns!r} names every leaf, so that nothing is shared.")
