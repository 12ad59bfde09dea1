"""What a federated algorithm is: pure functions for the server and for one client.

They are traced into the engine, which packs clients on lanes, cuts what the server sends to each
client's tier, and merges what clients send entry by entry over those that own an entry. It
knows nothing of lanes, devices or tiers: it works on one client's part as if it were the whole.

**Cut and merged.** Wherever a state, a memory or a message holds a tree with the structure and the
shapes of the variables, the engine cuts it to the client's tier on its way to the client, and puts
it back where it belongs on its way to the server. All else in them (scalars, counters) travels as
it is.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jfed.models.model import Params

MEANS = ("owners", "clients")  # whose mean `Merged.per_client` takes


class Server(NamedTuple):
    """What the server keeps from round to round, all of it in checkpoints.

    Attributes:
      variables: the global ones, which are evaluated.
      state: the algorithm's own, any pytree: a control variate, an optimizer's memory.
    """

    variables: Params
    state: Any = ()


def _all(tree: Any) -> Any:
    return tree


class Client(NamedTuple):
    """What a client knows in a round. Numbers are traced scalars.

    Attributes:
      sent: what the server sent, see `Algorithm.send`, cut to the client's tier.
      loss: `loss(params, batch, key) -> (loss, metrics)` of the tier's model.
      number: of the client.
      examples: that it holds.
      steps: batches that it trains on in this round.
      weight: of the client in the mean, see `ServerConfig.weights`.
      round: from 0.
      learning_rate: of this round, see `ClientConfig`.
      own: `message -> message`, with zeros in what does not leave the client: entries that its tier
        does not own, and personal leaves. The engine does so to what `client_final` returns.
    """

    sent: Any
    loss: Callable[..., Any]
    number: Int[Array, ""]
    examples: Int[Array, ""]
    steps: Int[Array, ""]
    weight: Float[Array, ""]
    round: Int[Array, ""]
    learning_rate: Float[Array, ""]
    own: Callable[[Any], Any] = _all


class Merged(NamedTuple):
    """What the clients of a round delivered, merged.

    Attributes:
      message: the parts of the clients' messages, each merged by its weighted mean (or the
        aggregator): for each global entry over the clients that own it, 0 where none does.
      owners: for each entry of the variables, how many clients that own it delivered.
      clients: how many delivered.
      population: for each entry of the variables, how many clients of the federation own it, each
        in its own tier.
      round: from 0.
      key: the server's own of this round.
      everyone: how many clients the federation has, those without a tier too.
    """

    message: dict[str, Any]
    owners: Params
    clients: Float[Array, ""]
    population: Params
    round: Int[Array, ""]
    key: Array
    everyone: Float[Array, ""]

    def per_client(self, part: str, of: str = "owners") -> Params:
        """The mean of a part over the "owners" of an entry in the federation, or all its "clients".

        Those who delivered nothing count as 0. Of weighted parts, the weighted mean is taken as the
        mean of those who delivered.
        """

        def mean(merged: Array, delivered: Array, owners: Array) -> Array:
            all_ = owners if of == "owners" else self.everyone
            return merged * (delivered / jnp.maximum(all_, 1))

        return jax.tree.map(mean, self.message[part], self.owners, self.population)


def _nothing(variables: Params) -> Any:
    del variables
    return ()


def _variables(server: Server) -> Any:
    return server.variables


@dataclasses.dataclass(frozen=True, eq=False)
class Algorithm:
    """A federated algorithm. The same object's programs are compiled once in a process.

    Attributes:
      client_init: `(client, memory, key) -> local`, at a client's first batch of a round: its
        parameters, its optimizer's state, what it needs of its memory; any pytree. Memory is cut to
        the client's tier, as `client.sent` is.
      client_step: `(client, local, batch, key) -> (local, metrics)`, one `jfed.models.Batch`, to be
        given to `client.loss`; `metrics` are the `jfed.models.Metrics` that this returns, sums over
        the batch's real examples. Training FLOPs are counted by how often a step calls the loss, a
        gradient each; what a loop calls counts once.
      client_final: `(client, local, key) -> (message, memory)`, after the last batch. A message is
        a dict of parts; a part is a tree like the variables (of the tier), or any other pytree of
        float32 arrays.
      server_step: `(server, merged) -> server`.
      server_init: `variables -> state`, see `Server`.
      memory_init: `variables -> memory` that a client has before its first round, kept from round
        to round, whatever tier it is in; () for none.
      send: `server -> tree`, what a client gets.
      weights: of parts of the message that are not weighted by `client.weight`: `client -> scalar`
        by the part's name.
      parts: names of the parts of the message that are like the variables.
      personal: `path -> bool` of leaves of the variables, such as "classifier/kernel", that never
        leave a client: the engine takes them out of messages, and they are not counted as traffic.
      personalise: `(sent, memory) -> params`, a client's own model, which is tested on its own
        examples; all three are cut to its tier. None where all clients have the server's.
      measured: whether the bytes that travel are measured on messages of the run, instead of
        counted from shapes, see `jfed.algorithms.codecs`.
      is_private: whether clients are, see `jfed.algorithms.privacy`: then the server steps also in
        a round in which nobody delivers.
      name: how reports call it.
    """

    client_init: Callable[[Client, Any, Array], Any]
    client_step: Callable[[Client, Any, Any, Array], tuple[Any, Any]]
    client_final: Callable[[Client, Any, Array], tuple[dict[str, Any], Any]]
    server_step: Callable[[Server, Merged], Server]
    server_init: Callable[[Params], Any] = _nothing
    memory_init: Callable[[Params], Any] = _nothing
    send: Callable[[Server], Any] = _variables
    weights: Mapping[str, Callable[[Client], Any]] = dataclasses.field(default_factory=dict)
    parts: tuple[str, ...] = ("update",)
    personal: Callable[[str], bool] | None = None
    personalise: Callable[[Any, Any], Params] | None = None
    measured: bool = False
    is_private: bool = False
    name: str = "own"


def one_each(client: Client) -> Float[Array, ""]:
    """The weight of a part that counts every client once."""
    return jnp.ones_like(client.weight)
