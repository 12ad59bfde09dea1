"""FedNova (Wang et al. 2020, arXiv 2007.07481, section 4)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jfed.algorithms.algorithm import Algorithm, Client, Merged, Server
from jfed.algorithms.averaging import fedavg
from jfed.algorithms.clients import ClientConfig, sgd_momentum
from jfed.algorithms.servers import ServerConfig
from jfed.algorithms.sharing import shared
from jfed.algorithms.training import Local
from jfed.errors import ConfigError


@shared
def fednova(client: ClientConfig, server: ServerConfig) -> Algorithm:
    """Updates are divided by how much their client trained, so that many steps weigh no more.

    A client sends d_i = (x_i - x) / |a_i|_1, where |a_i|_1 is its number of steps tau, or with
    momentum rho (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho) (section 4.1). The server steps
    along tau_eff sum_i p_i d_i with tau_eff = sum_i p_i |a_i|_1 (equation 10), where p_i is the
    client's weight among those of the round; its optimizer is the paper's where it is SGD at rate
    1.

    Where clients own parts of the entries, the sum over d_i is for each entry over its owners;
    tau_eff is that of all clients of the round. After three rounds, with momentum and without,
    equal to the authors' code (JYWa/FedNova, 47b4e09) to 3e-7 of the weights' change.

    Raises:
      ConfigError: the clients' optimizer is another than SGD, with or without momentum, for which
        the normalisation is not known.
    """
    momentum = sgd_momentum(client)
    if momentum is None:
        raise ConfigError(
            "fednova needs clients with the optimizer 'sgd', with or without momentum, got "
            f"{client.optimizer!r} with {dict(client.optimizer_args)!r}."
        )
    inner = fedavg(client, server)

    def amount(steps: Array) -> Float[Array, ""]:
        tau = steps.astype(jnp.float32)
        return (tau - momentum * (1 - momentum**tau) / (1 - momentum)) / (1 - momentum)

    def client_final(client: Client, local: Local, key: Array) -> tuple[dict[str, Any], Any]:
        message, memory = inner.client_final(client, local, key)
        trained = amount(client.steps)
        update = jax.tree.map(lambda u: u / trained, message["update"])
        return {"update": update, "trained": trained}, memory

    def server_step(server: Server, merged: Merged) -> Server:
        effective = merged.message["trained"]
        update = jax.tree.map(lambda d: effective * d, merged.message["update"])
        return inner.server_step(server, merged._replace(message={"update": update}))

    return dataclasses.replace(inner, client_final=client_final, server_step=server_step)
