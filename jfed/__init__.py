"""Federated learning of Neural ODE image classifiers with different iteration counts, in JAX."""

from jfed import algorithms, data, models, tiers
from jfed.algorithms.clients import ClientConfig
from jfed.algorithms.servers import ServerConfig
from jfed.data.preprocessing import Augmentation
from jfed.engine.devices import EngineConfig
from jfed.engine.faults import FaultConfig
from jfed.errors import (
    CallbackError,
    ConfigError,
    DataError,
    DataNotFoundError,
    DeviceMemoryError,
    DivergedError,
    HostError,
    JfedError,
    PreemptedError,
    RunFolderError,
)
from jfed.reports import plots
from jfed.runs.api import load, simulate
from jfed.runs.checkpoints import CheckpointConfig
from jfed.runs.compiled import keep_compiled
from jfed.simulation.evaluation import EvaluationConfig
from jfed.simulation.loop import Result
from jfed.simulation.records import Evaluation, Record
from jfed.simulation.simulated_time import TimeConfig

__version__ = "0.1.0"
__all__ = [
    "Augmentation",
    "CallbackError",
    "CheckpointConfig",
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
    "HostError",
    "JfedError",
    "PreemptedError",
    "Record",
    "Result",
    "RunFolderError",
    "ServerConfig",
    "TimeConfig",
    "algorithms",
    "data",
    "keep_compiled",
    "load",
    "models",
    "plots",
    "simulate",
    "tiers",
]
