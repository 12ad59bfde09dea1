"""FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1) with any server optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jfed.algorithms.algorithm import Algorithm, Client, Merged, Server
from jfed.algorithms.clients import ClientConfig, make_optimizer
from jfed.algorithms.optimizers import rekeyed, step_owned
from jfed.algorithms.servers import ServerConfig, make_server_optimizer
from jfed.algorithms.sharing import shared
from jfed.algorithms.training import Correct, Local, local_training
from jfed.models.model import Params


@shared
def fedavg(
    client: ClientConfig, server: ServerConfig, *, correct: Correct | None = None
) -> Algorithm:
    """Clients send what training added to their weights; the server steps along the mean.

    Server SGD at rate 1 is the paper's average of weights. With momentum it is FedAvgM (Hsu et al.
    2019, arXiv 1909.06335); with Adagrad, Adam and Yogi it is FedAdagrad, FedAdam and FedYogi
    (Reddi et al. 2021, arXiv 2003.00295, algorithm 2, as Optax has it. Of Adam and Yogi the paper's
    tau is `eps`, and both moments are corrected for what they begin with: 0, Yogi's 1e-6, instead
    of v_{-1} = tau^2. Adagrad divides by sqrt(v + `eps`) instead of sqrt(v) + tau, and v_{-1} is
    `initial_accumulator_value`, 0.1 by default). Each entry is averaged over the clients that own
    it.

    Equal optimizers (and the same `correct`) give the same object, whose programs are compiled once
    in a process.

    Args:
      client: the clients' optimizer; `ClientConfig()`, plain SGD, if left out.
      server: the server's optimizer; `ServerConfig()`, the mean itself, if left out.
      correct: of the clients' gradients, see `local_training`.
    """
    training = local_training(make_optimizer(client), correct=correct)
    optimizer = make_server_optimizer(server)

    def client_final(client: Client, local: Local, key: Array) -> tuple[dict[str, Params], Any]:
        del key
        return {"update": jax.tree.map(jnp.subtract, local.params, client.sent)}, local.memory

    def server_step(server: Server, merged: Merged) -> Server:
        update, state = merged.message["update"], rekeyed(server.state, merged.key)
        return Server(*step_owned(optimizer, update, merged.owners, state, server.variables))

    return Algorithm(*training, client_final, server_step, server_init=optimizer.init)
