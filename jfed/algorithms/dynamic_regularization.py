"""FedDyn (Acar et al. 2021, arXiv 2111.04263, algorithm 1)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jfed.algorithms.algorithm import MEANS, Algorithm, Client, Merged, Server
from jfed.algorithms.averaging import fedavg
from jfed.algorithms.clients import ClientConfig
from jfed.algorithms.servers import ServerConfig, check_plain
from jfed.algorithms.sharing import shared
from jfed.algorithms.training import Local
from jfed.errors import check_number, one_of
from jfed.models.model import Params


@shared
def feddyn(
    client: ClientConfig, server: ServerConfig, *, alpha: float, h_over: str = "owners"
) -> Algorithm:
    """Each client's objective is corrected so that its minima are those of the whole.

    A client minimises L_k(theta) - <g_k, theta> + alpha/2 |theta - theta_t|^2, where g_k, its
    memory, begins with zeros, and then sets g_k <- g_k - alpha (theta_k - theta_t). The server sets
    h <- h - alpha (1/m) sum over P of (theta_k - theta_t), and theta_{t+1} to the mean of the
    theta_k less h / alpha.

    Where clients own parts of the entries, m is for each entry the number of clients that own it,
    or with `h_over="clients"` of all, as in the code of DepthFL (Kim et al., ICLR 2023); what
    nobody of a round owns stays. The paper's mean has equal weights,
    `ServerConfig(weights="count")`; with others, h too adds up the weighted mean, times as many
    clients as it is over. The server has no optimizer. After three rounds of equal clients equal
    to the authors' code (alpemreacar/FedDyn, 48a19fa) to 1e-7 of the weights' change; for unequal
    ones that divides alpha by a client's share of the examples, which the paper does not.

    Args:
      client: the clients' optimizer.
      server: must have the default optimizer, SGD at rate 1.
      alpha: 0 or more. With 0 this is FedAvg (the paper's h / alpha is then 0 / 0, here 0).
      h_over: whose mean h is of, for each entry: "owners" or "clients".
    """
    one_of("h_over", h_over, MEANS)
    check_number("feddyn alpha", alpha, least=0.0)
    check_plain("feddyn", server)

    def correct(gradient: Params, client: Client, local: Local) -> Params:
        def term(g: Array, memory: Array, w: Array, s: Array) -> Array:
            return g - memory + alpha * (w - s)

        return jax.tree.map(term, gradient, local.memory, local.params, client.sent)

    inner = fedavg(client, server, correct=correct)

    def client_final(client: Client, local: Local, key: Array) -> tuple[dict[str, Any], Params]:
        message, memory = inner.client_final(client, local, key)
        return message, jax.tree.map(lambda g, u: g - alpha * u, memory, message["update"])

    def server_step(server: Server, merged: Merged) -> Server:
        mean = merged.per_client("update", of=h_over)
        state = jax.tree.map(lambda h, u: h - alpha * u, server.state, mean)

        def move(w: Array, u: Array, h: Array, owners: Array) -> Array:
            return jnp.where(owners > 0, w + u - (h / alpha if alpha else 0), w)

        variables = jax.tree.map(
            move, server.variables, merged.message["update"], state, merged.owners
        )
        return Server(variables, state)

    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return dataclasses.replace(
        inner,
        client_final=client_final,
        server_step=server_step,
        server_init=zeros,
        memory_init=zeros,
    )
