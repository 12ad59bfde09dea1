"""FedProx (Li et al. 2020, arXiv 1812.06127, algorithm 2)."""

import jax

from jfed.algorithms.algorithm import Algorithm, Client
from jfed.algorithms.averaging import fedavg
from jfed.algorithms.clients import ClientConfig
from jfed.algorithms.servers import ServerConfig
from jfed.algorithms.sharing import shared
from jfed.algorithms.training import Local
from jfed.errors import check_number
from jfed.models.model import Params


@shared
def fedprox(client: ClientConfig, server: ServerConfig, *, mu: float) -> Algorithm:
    """Clients minimise h(w; w_t) = F(w) + mu/2 |w - w_t|^2 (equation 2) around what was sent, w_t.

    Where a client owns a part of the entries, the norm is over that part. The paper's server
    samples clients by their share of the examples and averages them alike; here who is sampled and
    how clients weigh are settings of the simulation. After three rounds of plain SGD equal to
    PFLlib's (d832e76) to 1e-7 of the weights' change.

    Args:
      client: the clients' optimizer.
      server: the server's optimizer.
      mu: 0 or more; with 0 this is FedAvg.
    """
    check_number("mu", mu, least=0.0)

    def correct(gradient: Params, client: Client, local: Local) -> Params:
        return jax.tree.map(lambda g, w, s: g + mu * (w - s), gradient, local.params, client.sent)

    return fedavg(client, server, correct=correct)
