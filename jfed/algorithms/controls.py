"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1, option II)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jfed.algorithms.algorithm import Algorithm, Client, Merged, Server, one_each
from jfed.algorithms.clients import ClientConfig, make_optimizer
from jfed.algorithms.optimizers import rekeyed, step_owned
from jfed.algorithms.servers import ServerConfig, make_server_optimizer
from jfed.algorithms.sharing import shared
from jfed.algorithms.training import Local, local_training
from jfed.models.model import Params


@shared
def scaffold(client: ClientConfig, server: ServerConfig) -> Algorithm:
    """Control variates c (of the server) and c_i (of each client, its memory) against client drift.

    Line by line of the paper: y_i <- y_i - eta_l (g_i(y_i) - c_i + c) (line 10); c_i+ <- c_i - c +
    (x - y_i) / (K eta_l) (line 12, option II, K the client's steps of the round); the server's
    optimizer steps along the mean of y_i - x (line 16, where SGD at the rate eta_g is the paper's),
    and c <- c + (1/N) sum over S of (c_i+ - c_i) (line 17). All begin with zeros.

    Where clients own parts of the entries, N is for each entry the number of clients that own it,
    so that c stays the mean of its owners' c_i, if they keep their tier. The paper averages y_i
    with equal weights: `ServerConfig(weights="count")`. With momentum or Adam at the clients option
    II is no longer the mean of their gradients; the paper has plain SGD. Twice FedAvg's bytes
    travel. After three rounds equal to PFLlib's (d832e76) to 3e-7 of the weights' change, control
    variates included.
    """
    optimizer = make_server_optimizer(server)
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)

    def correct(gradient: Params, client: Client, local: Local) -> Params:
        control = client.sent["control"]
        return jax.tree.map(lambda g, own, c: g - own + c, gradient, local.memory, control)

    def client_final(client: Client, local: Local, key: Array) -> tuple[dict[str, Params], Params]:
        x, c = client.sent["variables"], client.sent["control"]
        scale = client.steps.astype(jnp.float32) * client.learning_rate

        def renew(own: Array, c: Array, x: Array, y: Array) -> Array:
            return jnp.where(scale > 0, own - c + (x - y) / jnp.where(scale > 0, scale, 1), own)

        own = jax.tree.map(renew, local.memory, c, x, local.params)
        pairs = {"update": (local.params, x), "control": (own, local.memory)}
        return {name: jax.tree.map(jnp.subtract, *pair) for name, pair in pairs.items()}, own

    def server_step(server: Server, merged: Merged) -> Server:
        control, state = server.state
        control = jax.tree.map(jnp.add, control, merged.per_client("control"))
        update, state = merged.message["update"], rekeyed(state, merged.key)
        variables, state = step_owned(optimizer, update, merged.owners, state, server.variables)
        return Server(variables, (control, state))

    def server_init(variables: Params) -> Any:
        return zeros(variables), optimizer.init(variables)

    training = local_training(
        make_optimizer(client),
        correct=correct,
        start=lambda client, memory: client.sent["variables"],
    )
    return Algorithm(
        *training,
        client_final,
        server_step,
        server_init=server_init,
        memory_init=zeros,
        send=lambda server: {"variables": server.variables, "control": server.state[0]},
        weights={"control": one_each},
        parts=("update", "control"),
    )
