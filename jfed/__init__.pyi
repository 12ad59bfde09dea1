# What `import jfed` offers; each name is imported when it is first asked for.
from . import algorithms as algorithms, data as data, models as models, tiers as tiers
from .algorithms.clients import ClientConfig as ClientConfig
from .algorithms.servers import ServerConfig as ServerConfig
from .data.preprocessing import Augmentation as Augmentation
from .engine.devices import EngineConfig as EngineConfig, use_cores as use_cores
from .engine.faults import FaultConfig as FaultConfig
from .errors import (
    CallbackError as CallbackError,
    ConfigError as ConfigError,
    DataError as DataError,
    DataNotFoundError as DataNotFoundError,
    DeviceMemoryError as DeviceMemoryError,
    DivergedError as DivergedError,
    HostError as HostError,
    JfedError as JfedError,
    PreemptedError as PreemptedError,
    RunFolderError as RunFolderError,
)
from .reports import plots as plots
from .runs.api import load as load, simulate as simulate
from .runs.checkpoints import CheckpointConfig as CheckpointConfig
from .runs.compiled import keep_compiled as keep_compiled
from .simulation.evaluation import EvaluationConfig as EvaluationConfig
from .simulation.loop import Result as Result
from .simulation.records import Evaluation as Evaluation, Record as Record
from .simulation.simulated_time import TimeConfig as TimeConfig

__version__: str
