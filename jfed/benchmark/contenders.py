"""Who takes part, as plain values that another process can be told, and how each is built there."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax

from jfed.benchmark.matmul import TorchProducts, XlaProducts, product_flops
from jfed.benchmark.tasks import RoundWork, Task
from jfed.engine.devices import EngineConfig
from jfed.errors import one_of

KINDS = ("jfed", "loop", "vmap", "torch", "fedjax", "matmul-xla", "matmul-torch")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One contender.

    Attributes:
      name: as the table shows it.
      kind: one of `KINDS`.
      task: the federation to train; None for matrix products.
      engine: of jfed.
      cpu_devices: how many devices JAX makes of the CPU; "jfed" spreads its lanes over
        `engine.devices` of them.
      channels_last: PyTorch's memory layout.
      matrix: height and width of the matrices of a product.
      dtype: of the products.
      once: it is slow: time a single round of it.
    """

    name: str
    kind: str
    task: Task | None = None
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    cpu_devices: int = 1
    channels_last: bool = False
    matrix: int = 0
    dtype: str = "float32"
    once: bool = False

    def __post_init__(self) -> None:
        one_of("kind of contender", self.kind, KINDS)

    @property
    def is_peak(self) -> bool:
        """Whether it measures the machine, and trains nothing."""
        return self.task is None


@runtime_checkable
class Runner(Protocol):
    """What runs in a contender's process; those that train have `variables` as well."""

    def round(self, number: int) -> float | None:
        """Does a round and waits for it; returns its mean training loss if it is known."""


def platform_of(contender: Contender, platform: str) -> str:
    """The platform that the contender's process opens: PyTorch's leave accelerators alone."""
    return "cpu" if contender.kind.endswith("torch") else platform


def build(contender: Contender, platform: str) -> tuple[Runner, RoundWork]:
    """Makes a contender's runner, and tells what a round of it amounts to.

    Args:
      contender: which.
      platform: JAX's, of the run: "cpu", "gpu" or "tpu".

    Raises:
      ImportError: a rival is not installed.
    """
    kind, task = contender.kind, contender.task
    if task is None:
        products = XlaProducts if kind == "matmul-xla" else TorchProducts
        flops = product_flops(contender.matrix)
        return products(contender.matrix, contender.dtype), RoundWork(0, 0, flops)
    return _client_loop(contender, task, platform), task.work()


def _client_loop(contender: Contender, task: Task, platform: str) -> Runner:
    # Each library is imported only in the processes that need it.
    from jfed.benchmark import jax_runners

    if contender.kind == "jfed":
        return jax_runners.JfedRunner(task, contender.engine)
    if contender.kind == "torch":
        import torch

        from jfed.benchmark.torch_runner import TorchRunner

        cuda = platform != "cpu" and torch.cuda.is_available()
        device = "cuda" if cuda else "cpu"
        return TorchRunner(task, channels_last=contender.channels_last, device=device)
    if contender.kind == "fedjax":
        from jfed.benchmark.fedjax_runner import FedjaxRunner

        return FedjaxRunner(task)
    kinds: dict[str, Any] = {"loop": jax_runners.LoopRunner, "vmap": jax_runners.VmapRunner}
    return kinds[contender.kind](task)


def set_up_jax(contender: Contender, platform: str) -> None:
    """Configures JAX before it opens its devices: the contender's, and memory as it is needed."""
    chosen = platform_of(contender, platform)
    # "gpu" is what JAX calls the backend; the platform it opens is CUDA's or AMD's.
    if chosen == "cpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", contender.cpu_devices)
