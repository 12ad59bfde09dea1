"""Local training by an Optax optimizer: the client's half of most algorithms."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array

from jfed.algorithms.algorithm import Client
from jfed.algorithms.optimizers import MakeOptimizer, rekeyed
from jfed.models.losses import Batch, Metrics
from jfed.models.model import Params


class Local(NamedTuple):
    """What a client holds while it trains.

    Attributes:
      params: its weights.
      optimizer: the state of its optimizer.
      memory: what it remembered when it began, see `Algorithm.memory_init`.
    """

    params: Params
    optimizer: Any
    memory: Any


Correct = Callable[[Params, Client, Local], Params]


class LocalTraining(NamedTuple):
    """`client_init` and `client_step` of an `Algorithm`, whose local state is a `Local`."""

    client_init: Callable[[Client, Any, Array], Local]
    client_step: Callable[[Client, Local, Batch, Array], tuple[Local, Metrics]]


def _sent(client: Client, memory: Any) -> Params:
    del memory
    return client.sent


def local_training(
    optimizer: MakeOptimizer,
    *,
    correct: Correct | None = None,
    start: Callable[[Client, Any], Params] = _sent,
) -> LocalTraining:
    """Steps of an optimizer on the client's loss, from its state made anew each round.

    Args:
      optimizer: from the learning rate to an `optax.GradientTransformation`.
      correct: `(gradient, client, local) -> gradient`, which the optimizer gets in place of the
        loss's own: a proximal term, a control variate.
      start: `(client, memory) -> params` to begin with; what the server sent by default.
    """

    def client_init(client: Client, memory: Any, key: Array) -> Local:
        params = start(client, memory)
        state = optimizer(client.learning_rate).init(params)
        return Local(params, rekeyed(state, key), memory)

    def client_step(
        client: Client, local: Local, batch: Batch, key: Array
    ) -> tuple[Local, Metrics]:
        gradient, metrics = jax.grad(client.loss, has_aux=True)(local.params, batch, key)
        if correct is not None:
            gradient = correct(gradient, client, local)
        updates, state = optimizer(client.learning_rate).update(
            gradient, local.optimizer, local.params
        )
        params = optax.apply_updates(local.params, updates)
        return local._replace(params=params, optimizer=state), metrics

    return LocalTraining(client_init, client_step)
