"""Algorithms: what clients and server do, as pure functions that the engine runs.

`Algorithm` is the interface, `fedavg` its default instance, `local_training` the client's half of
most. The others are a short file each, by name in `AlgorithmConfig`. An algorithm of your own is a
function that returns an `Algorithm`.
"""

from jfed.algorithms.algorithm import Algorithm, Client, Merged, Server, one_each
from jfed.algorithms.averaging import fedavg
from jfed.algorithms.catalogue import ALGORITHMS, AlgorithmConfig, make_algorithm
from jfed.algorithms.clients import ClientConfig, make_optimizer
from jfed.algorithms.codecs import Codec, CodecConfig, compressed
from jfed.algorithms.controls import scaffold
from jfed.algorithms.dynamic_regularization import feddyn
from jfed.algorithms.normalized_averaging import fednova
from jfed.algorithms.optimizers import step_owned
from jfed.algorithms.personal_leaves import fedbn, fedper, fedrep
from jfed.algorithms.personal_models import ditto
from jfed.algorithms.privacy import PrivacyConfig, private
from jfed.algorithms.proximal import fedprox
from jfed.algorithms.servers import ServerConfig, make_server_optimizer
from jfed.algorithms.training import Local, local_training

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AlgorithmConfig",
    "Client",
    "ClientConfig",
    "Codec",
    "CodecConfig",
    "Local",
    "Merged",
    "PrivacyConfig",
    "Server",
    "ServerConfig",
    "compressed",
    "ditto",
    "fedavg",
    "fedbn",
    "feddyn",
    "fednova",
    "fedper",
    "fedprox",
    "fedrep",
    "local_training",
    "make_algorithm",
    "make_optimizer",
    "make_server_optimizer",
    "one_each",
    "private",
    "scaffold",
    "step_owned",
]
