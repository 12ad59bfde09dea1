"""Algorithms: what clients and server do, as pure functions that the engine runs.

`Algorithm` is the interface, `fedavg` its default instance, `local_training` the client's half of
most. An algorithm of your own is a function that returns an `Algorithm`.
"""

from jfed.algorithms.algorithm import Algorithm, Client, Merged, Server, one_each
from jfed.algorithms.averaging import fedavg
from jfed.algorithms.clients import ClientConfig, Codec, make_optimizer
from jfed.algorithms.optimizers import step_owned
from jfed.algorithms.servers import ServerConfig
from jfed.algorithms.training import Local, local_training

__all__ = [
    "Algorithm",
    "Client",
    "ClientConfig",
    "Codec",
    "Local",
    "Merged",
    "Server",
    "ServerConfig",
    "fedavg",
    "local_training",
    "make_optimizer",
    "one_each",
    "step_owned",
]
