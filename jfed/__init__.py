"""Federated learning of Neural ODE image classifiers with different iteration counts, in JAX."""

from jfed import data, models, tiers
from jfed.algorithms.clients import ClientConfig
from jfed.algorithms.servers import ServerConfig
from jfed.data.preprocessing import Augmentation
from jfed.engine.devices import EngineConfig
from jfed.engine.faults import FaultConfig
from jfed.errors import (
    ConfigError,
    DataError,
    DataNotFoundError,
    DeviceMemoryError,
    DivergedError,
    JfedError,
    PreemptedError,
    RunFolderError,
)
from jfed.reports import plots
from jfed.simulation.evaluation import EvaluationConfig
from jfed.simulation.loop import Result, simulate
from jfed.simulation.records import Evaluation, Record

__version__ = "0.1.0"
__all__ = [
    "Augmentation",
    "ClientConfig",
    "ConfigError",
    "DataError",
    "DataNotFoundError",
    "DeviceMemoryError",
    "DivergedError",
    "EngineConfig",
    "Evaluation",
    "EvaluationConfig",
    "FaultConfig",
    "JfedError",
    "PreemptedError",
    "Record",
    "Result",
    "RunFolderError",
    "ServerConfig",
    "data",
    "models",
    "plots",
    "simulate",
    "tiers",
]
