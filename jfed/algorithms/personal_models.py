"""Ditto (Li et al. 2021, arXiv 2012.04221, algorithm 1)."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array

from jfed.algorithms.algorithm import Algorithm, Client
from jfed.algorithms.averaging import fedavg
from jfed.algorithms.clients import ClientConfig, make_optimizer
from jfed.algorithms.servers import ServerConfig
from jfed.algorithms.sharing import shared
from jfed.algorithms.training import Local, local_training
from jfed.errors import check_number
from jfed.models.model import Params


@shared
def ditto(client: ClientConfig, server: ServerConfig, *, strength: float) -> Algorithm:
    """Beside the global model each client trains its own, v_k, which is drawn to what was sent.

    v_k is the client's memory, and begins as the first global model. On each batch it steps on
    F_k(v) + strength/2 |v - w_t|^2 (line 8, lambda is `strength`), with an optimizer as the global
    one's; the two trainings see the same batches. Only FedAvg's update travels. A client that
    moves to another tier takes along the entries of v_k that both tiers own. After three rounds
    equal to the authors' code (litian96/ditto, 26d9b29) to 2e-7 of the weights' change.

    Args:
      client: the optimizer of both models.
      server: the server's optimizer.
      strength: 0 or more; with 0 clients train alone.
    """
    check_number("ditto strength", strength, least=0.0)
    common = fedavg(client, server)

    def correct(gradient: Params, client: Client, local: Local) -> Params:
        def pull(g: Array, v: Array, w: Array) -> Array:
            return g + strength * (v - w)

        return jax.tree.map(pull, gradient, local.params, client.sent)

    own = local_training(
        make_optimizer(client), correct=correct, start=lambda client, memory: memory
    )

    def client_init(client: Client, memory: Params, key: Array) -> tuple[Local, Local]:
        return common.client_init(client, (), key), own.client_init(client, memory, key)

    def client_step(
        client: Client, local: tuple[Local, Local], batch: Any, key: Array
    ) -> tuple[tuple[Local, Local], Any]:
        global_, metrics = common.client_step(client, local[0], batch, key)
        mine, _ = own.client_step(client, local[1], batch, key)
        return (global_, mine), metrics

    def client_final(
        client: Client, local: tuple[Local, Local], key: Array
    ) -> tuple[dict[str, Any], Params]:
        return common.client_final(client, local[0], key)[0], local[1].params

    return dataclasses.replace(
        common,
        client_init=client_init,
        client_step=client_step,
        client_final=client_final,
        memory_init=lambda variables: variables,
        personalise=lambda sent, memory: memory,
    )
