"""FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1) with any server optimizer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jfed.algorithms.algorithm import Algorithm, Client, Merged, Server
from jfed.algorithms.clients import OPTIMIZER, ClientConfig, make_optimizer
from jfed.algorithms.optimizers import step_owned
from jfed.algorithms.servers import SERVER_OPTIMIZER, ServerConfig, make_server_optimizer
from jfed.algorithms.training import Correct, Local, local_training
from jfed.models.model import Params


def fedavg(
    client: ClientConfig | None = None,
    server: ServerConfig | None = None,
    *,
    correct: Correct | None = None,
) -> Algorithm:
    """Clients send what training added to their weights; the server steps along the mean.

    Server SGD at rate 1 is the paper's average of weights; momentum, Adam, Yogi are those of Reddi
    et al. 2021 (arXiv 2003.00295). Equal optimizers give the same object, whose programs are
    compiled once in a process; with `correct`, each call makes another.

    Args:
      client: the clients' optimizer.
      server: the server's optimizer.
      correct: of the clients' gradients, see `local_training`.
    """
    clients, servers = client or ClientConfig(), server or ServerConfig()
    if correct is not None:
        return _make(clients, servers, correct)
    # What else they hold is none of the algorithm's, or data.
    own = {name: getattr(clients, name) for name in OPTIMIZER}
    of_server = {name: getattr(servers, name) for name in SERVER_OPTIMIZER}
    return _made(ClientConfig(**own), ServerConfig(**of_server))


@functools.lru_cache(maxsize=64)
def _made(client: ClientConfig, server: ServerConfig) -> Algorithm:
    return _make(client, server, None)


def _make(client: ClientConfig, server: ServerConfig, correct: Correct | None) -> Algorithm:
    training = local_training(make_optimizer(client), correct=correct)
    optimizer = make_server_optimizer(server)

    def client_final(client: Client, local: Local, key: Array) -> tuple[dict[str, Params], Any]:
        del key
        return {"update": jax.tree.map(jnp.subtract, local.params, client.sent)}, local.memory

    def server_step(server: Server, merged: Merged) -> Server:
        return Server(
            *step_owned(
                optimizer, merged.message["update"], merged.owners, server.state, server.variables
            )
        )

    return Algorithm(*training, client_final, server_step, server_init=optimizer.init)
