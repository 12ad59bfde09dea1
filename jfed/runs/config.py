"""The settings of `jfed run`: one flat frozen dataclass, and its presets."""

import dataclasses
from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec

from jfed import tiers as tiers_lib
from jfed.errors import ConfigError, one_of
from jfed.models.ode_nets import Iterations


def parse_iterations(text: str) -> Iterations:
    """Reads 4 as 4 iterations in every stage, 3-2-2 as counts per stage."""
    try:
        # A leading minus is a sign, so that -1 is refused as a number, not as a text.
        counts = tuple(int(part) for part in (text.split("-") if text[:1] != "-" else [text]))
    except ValueError:
        raise ConfigError(
            f"iterations must look like 4, or like 3-2-2 for counts per stage, got {text!r}."
        ) from None
    return counts if len(counts) > 1 else counts[0]


_IterationsFlag = Annotated[
    Iterations,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT|INT-INT-...",
        instance_from_str=lambda args: parse_iterations(args[0]),
        is_instance=lambda x: isinstance(x, int | tuple),
        str_from_instance=lambda x: [tiers_lib.tier_name(x)],
    ),
]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides the outcome of a run.

    Attributes:
      data: data set: cifar10, cifar100, fashion_mnist, mnist, digits (embedded) or synthetic.
      data_dir: where TFDS keeps prepared data sets; the variable TFDS_DATA_DIR, or TFDS's own
        default, where not given.
      image_size: height and width that images are averaged down to; a divisor of their own.
      train_examples: a random subset of the training images; all where not given.
      eval_examples: a random subset of the test images; all where not given.
      partition: how examples are dealt out: iid, dirichlet, shards or quantity.
      alpha: concentration of the partitions dirichlet and quantity; smaller is more uneven.
      shards_per_client: of the partition shards: about as many classes a client.
      min_examples: the least a client gets from the partitions dirichlet and quantity.
      clients: how many there are.
      cohort: how many train in a round, drawn without replacement; all where not given.
      model: a model preset, see `jfed models`.
      widths: channels of each stage, in place of the preset's.
      method: what clients that cannot afford the full model train: ode (fewer iterations), depthfl,
        nefl-d, heterofl, fedrolex, exclusive (nothing), or full (all can); ode for an ODENet and
        full for a ResNet where not given. Settings of another method must not be given.
      iterations: of ode: solver iterations of each tier of clients: 4 for all stages of the
        network, or 3-2-2 for counts per stage; 1, 2 and 4 where not given. Of full and exclusive:
        at most one entry, that of the ODENet.
      sharing: of ode: all (every weight is everybody's; the default), norms-per-depth,
        steps-per-depth, norms-and-steps-per-depth or classifier-per-depth.
      ratios: of heterofl and fedrolex: share of the channels of each tier; of nefl-d: share of the
        parameters.
      scaler: of heterofl and fedrolex: divide norms' inputs by the ratio in training; yes where not
        given.
      depths: of depthfl: stages of each tier; every number of them where not given.
      distillation: weight of self-distillation: of ode from the iterations that a client affords to
        those of the shallower tiers (0 where not given), of depthfl among exits (1).
      able: of exclusive: share of the clients that can afford the full model.
      shares: share of the clients in each tier, summing to 1; equal where not given.
      draw_tiers: sampled clients draw their tier in each round, by the shares, among those at most
        so many places from their own (NeFL: 2); 0: they keep their own.
      solver: Euler, Heun, Midpoint, Ralston or Bosh3. This and the next three are of ODENets only.
      horizon: fixed (integrate over [0, 1]) or proportional (over [0, C], steps of 1).
      function: preactivation or postactivation, the order inside an ODE block.
      learn_steps: ODE blocks learn the sizes of their steps; see sharing.
      norm: batch or group.
      unroll: trace every solver iteration (mostly faster to run) instead of a loop (faster to
        compile, about half the memory).
      dtype: what convolutions compute in: float32 or bfloat16.
      conv: form of the convolutions: auto (by a measured table), xla, transposed, im2col,
        winograd2, winograd4; see `jfed.models.convolution`.
      rounds: how many.
      epochs: passes of a client over its examples in a round.
      steps: batches of a client in a round, in place of epochs.
      batch_size: of clients.
      optimizer: of clients: any of Optax by name.
      learning_rate: of clients, in the first round.
      schedule: of the learning rate over rounds: constant, cosine or step.
      momentum: of the clients' optimizer.
      weight_decay: L2 penalty of clients.
      clip_norm: largest global norm of clients' gradients.
      mask_absent_classes: clients mask the logits of classes that they have no example of.
      server_optimizer: of the server: any of Optax by name. sgd with rate 1 is FedAvg.
      server_learning_rate: of the server.
      server_momentum: of the server's optimizer.
      aggregator: how the server makes one update of the clients': mean, median, trimmed-mean, krum,
        multi-krum or norm-clipping. Settings of another aggregator must not be given.
      trim: of trimmed-mean: share of the values left out at each end.
      krum_byzantine: of krum and multi-krum: hostile clients in a round to withstand; takes twice
        as many clients in a round, and three more.
      krum_selected: of multi-krum: updates to average; those of all others where not given.
      clip_updates: of norm-clipping: L2 norm of an update; the round's median where not given.
      dropout: share of sampled clients that get the model and send nothing.
      stragglers: share of sampled clients that do only part of their steps.
      straggler_steps: that part.
      non_finite: share of sampled clients whose update is not a number.
      exploding: share of sampled clients that send a multiple of their update.
      explosion: that multiple.
      hostile: share of the clients that attack, the same ones in every round.
      attack: what they send: sign-flip, noise or scaled.
      attack_noise: standard deviation of what they send with noise.
      attack_scale: multiple of their update that they send with scaled.
      pad: zeros around a training image before a random crop.
      flip: mirror half of the training images.
      eval_every: rounds between evaluations; 0 for only the last.
      eval_iterations: iteration counts to evaluate beside those that clients train.
      eval_solvers: solvers to evaluate all of these counts with, beside the one of training.
      eval_batch_size: of evaluation.
      calibration_examples: training images that batch-norm statistics are measured on.
      devices: how many to use; all that JAX sees where not given, of a CPU a device for each core.
      lanes: clients that train at the same time on a device; by backend where not given.
      mapping: how a device runs its lanes: vmap, map, unroll, or auto (by backend).
      seed: of everything random.
    """

    data: str = "digits"
    data_dir: str | None = None
    image_size: int | None = None
    train_examples: int | None = None
    eval_examples: int | None = None
    partition: str = "dirichlet"
    alpha: float = 0.5
    shards_per_client: int = 2
    min_examples: int = 5
    clients: int = 20
    cohort: int | None = None
    model: str = "odenet-digits"
    widths: tuple[int, ...] | None = None
    method: str | None = None
    iterations: tuple[_IterationsFlag, ...] | None = None
    sharing: str | None = None
    ratios: tuple[float, ...] | None = None
    scaler: bool | None = None
    depths: tuple[int, ...] | None = None
    distillation: float | None = None
    able: float | None = None
    shares: tuple[float, ...] | None = None
    draw_tiers: int = 0
    solver: str = "Euler"
    horizon: str = "fixed"
    function: str = "preactivation"
    learn_steps: bool = False
    norm: str = "batch"
    unroll: bool = False
    dtype: str = "float32"
    conv: str = "auto"
    rounds: int = 20
    epochs: int = 2
    steps: int | None = None
    batch_size: int = 16
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    schedule: str = "constant"
    momentum: float | None = None
    weight_decay: float = 0.0
    clip_norm: float | None = None
    mask_absent_classes: bool = False
    server_optimizer: str = "sgd"
    server_learning_rate: float = 1.0
    server_momentum: float | None = None
    aggregator: str = "mean"
    trim: float | None = None
    krum_byzantine: int | None = None
    krum_selected: int | None = None
    clip_updates: float | None = None
    dropout: float = 0.0
    stragglers: float = 0.0
    straggler_steps: float = 0.5
    non_finite: float = 0.0
    exploding: float = 0.0
    explosion: float = 1e6
    hostile: float = 0.0
    attack: str = "sign-flip"
    attack_noise: float = 1.0
    attack_scale: float = 10.0
    pad: int = 0
    flip: bool = False
    eval_every: int = 5
    eval_iterations: tuple[_IterationsFlag, ...] = ()
    eval_solvers: tuple[str, ...] = ()
    eval_batch_size: int = 250
    calibration_examples: int = 2000
    devices: int | None = None
    lanes: int | None = None
    mapping: str = "auto"
    seed: int = 0


_CIFAR10 = RunConfig(
    data="cifar10",
    clients=100,
    cohort=10,
    min_examples=10,
    model="odenet-56",
    iterations=(2, 4, 8),
    rounds=200,
    epochs=1,
    batch_size=32,
    schedule="cosine",
    weight_decay=5e-4,
    pad=4,
    flip=True,
    eval_every=10,
)
# What two CPU cores train in a minute or two.
_CIFAR10_SMALL = dataclasses.replace(
    _CIFAR10,
    image_size=16,
    train_examples=20000,
    eval_examples=5000,
    partition="iid",
    clients=80,
    cohort=5,
    model="odenet-20",
    iterations=(1, 2, 4),
    rounds=30,
    batch_size=20,
    learning_rate=0.05,
    momentum=0.9,
    pad=0,
    eval_every=0,
    calibration_examples=1000,
)
# Seconds, which only show that everything works.
_SMOKE = RunConfig(
    train_examples=200,
    eval_examples=50,
    clients=4,
    widths=(4, 4),
    iterations=(1, 2),
    rounds=1,
    epochs=1,
    conv="im2col",
)
RUN_PRESETS: dict[str, RunConfig] = {
    "digits": RunConfig(),
    "cifar10-flexible": _CIFAR10,
    "cifar10-resnet": dataclasses.replace(_CIFAR10, model="resnet-56", iterations=None),
    "cifar10-small": _CIFAR10_SMALL,
    "smoke": _SMOKE,
}


def run_preset(name: str) -> RunConfig:
    """The settings of a preset; ConfigError with the close matches for an unknown name."""
    return RUN_PRESETS[one_of("preset", name, tuple(RUN_PRESETS))]
