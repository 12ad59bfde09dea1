"""What a program calls: run a federation, in a folder or in memory, and have a run back."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from jfed import files
from jfed.algorithms.algorithm import Algorithm
from jfed.algorithms.clients import ClientConfig
from jfed.algorithms.privacy import PrivacyConfig
from jfed.algorithms.servers import ServerConfig
from jfed.data import Dataset
from jfed.data.preprocessing import Augmentation
from jfed.engine.devices import EngineConfig
from jfed.engine.faults import FaultConfig
from jfed.errors import ConfigError, RunFolderError, check_type
from jfed.models.model import Model, Statistics
from jfed.runs import assembly, fingerprints, growth, running, trained
from jfed.runs.assembly import Prepared
from jfed.runs.checkpoints import CheckpointConfig, in_tree_of, stored
from jfed.settings import as_json, differences, read_settings
from jfed.simulation import loop
from jfed.simulation.evaluation import EvaluationConfig, evaluated_tiers
from jfed.simulation.federation import Federation
from jfed.simulation.loop import Callback, Result
from jfed.simulation.population import Sampler
from jfed.simulation.simulated_time import TimeConfig
from jfed.tiers import Tiers
from jfed.tiers.communication import Traffic
from jfed.tiers.tier import as_tiers

_MADE_BY = {"made_by": "jfed.simulate"}  # tells such a folder from one of `jfed run`


def simulate(
    data: Dataset,
    partition: Sequence[Any],
    tiers: Tiers | Model,
    *,
    rounds: int,
    cohort: int | None = None,
    sampler: Sampler | None = None,
    shares: Sequence[float] | None = None,
    draw_tiers: int = 0,
    algorithm: Algorithm | None = None,
    client: ClientConfig | None = None,
    server: ServerConfig | None = None,
    evaluation: EvaluationConfig | None = None,
    augmentation: Augmentation | None = None,
    engine: EngineConfig | None = None,
    faults: FaultConfig | None = None,
    privacy: PrivacyConfig | None = None,
    time: TimeConfig | None = None,
    allow_unused: bool = False,
    allow_overlap: bool = False,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    workdir: epath.PathLike | None = None,
    checkpoints: CheckpointConfig | None = None,
) -> Result:
    """Runs federated learning and returns what came of it.

    The same arguments give the same bits on the same machine.

    With `workdir` the run has a folder, as those of `jfed run`, which `jfed report` and `jfed.load`
    read: `config.json`, `metrics.csv`, `checkpoints/`, and at the end `summary.json` and figures.
    Where it was stopped or killed, the same call goes on from its last checkpoint, to the same
    bits; a finished run is only read. Other settings, data, partition or tiers are refused: of
    functions names are compared, of those that were made inside of others also their code and what
    they close over, of tiers names, shapes and what `jfed.tiers.start_from` was given. (Ctrl-C
    loses what follows the last checkpoint.)

    Args:
      data: training images for the clients, test images for the evaluation.
      partition: for each client the indices of its training examples, see `jfed.data.partitions`.
      tiers: what clients train, see `jfed.tiers`; a `Model` makes one tier.
      rounds: how many.
      cohort: clients that train in a round, drawn without replacement; all by default.
      sampler: `(round, rng) -> numbers of clients`, at most `cohort`, in place of that draw; rounds
        from 0.
      shares: of the clients, for each tier, summing to 1; equal by default.
      draw_tiers: each sampled client draws its tier anew in each round among those at most so many
        places from its own in `tiers.members`, with `shares` as probabilities (NeFL, arXiv
        2308.07761, has 2); 0: it keeps its own. Clients without a tier keep none.
      algorithm: what clients and server do, see `jfed.algorithms.Algorithm`; by default what the
        method's authors train with, FedAvg with the optimizers of `client` and `server` for all but
        DepthFL. Another one has optimizers of its own; the
        rest is still that of `client` (epochs, batches, learning rate and its schedule) and
        of `server` (weights, aggregator).
      client: how clients train.
      server: how the server makes one update of theirs, and uses it.
      evaluation: when and how the global model is tested.
      augmentation: of training images.
      engine: how clients are spread over devices.
      faults: clients that fail or attack, simulated.
      privacy: of the clients, see `jfed.algorithms.PrivacyConfig`; none by default.
      time: the clients' devices, for a simulated clock with a deadline; none by default.
      allow_unused: training examples may belong to no client.
      allow_overlap: an example may belong to several clients.
      seed: of everything random.
      callbacks: functions, each called with the record of every round, in order, as soon as it is
        known. If one raises, the round under way is still recorded, and not told. Rounds of an
        earlier call in the same folder are not told again.
      workdir: the run folder, local or `gs://`; none by default.
      checkpoints: when a run with a folder saves.

    Raises:
      ConfigError: settings that cannot work, before anything is compiled.
      RunFolderError: the folder belongs to another run, or cannot be read or written.
      CallbackError: a callback raised. In a folder the last recorded round is saved first.
      DivergedError: no client that trained honestly in a round ended with a finite update, or the
        model or its test loss is not finite. Single updates that are not are left out.
      DeviceMemoryError: the devices have too little memory.
    """
    callbacks = loop.check_callbacks(callbacks)
    check_type("checkpoints", checkpoints, CheckpointConfig, type(None))
    check_type("workdir", workdir, str, os.PathLike, type(None))
    if workdir is None and checkpoints is not None:
        raise ConfigError(f"checkpoints need a workdir to be in, got {checkpoints!r} without one.")
    options: dict[str, Any] = {
        "rounds": rounds,
        "cohort": cohort,
        "sampler": sampler,
        "shares": shares,
        "draw_tiers": draw_tiers,
        "algorithm": algorithm,
        "client": ClientConfig() if client is None else client,
        "server": ServerConfig() if server is None else server,
        "evaluation": EvaluationConfig() if evaluation is None else evaluation,
        "augmentation": Augmentation() if augmentation is None else augmentation,
        "engine": EngineConfig() if engine is None else engine,
        "faults": FaultConfig() if faults is None else faults,
        "privacy": PrivacyConfig() if privacy is None else privacy,
        "time": TimeConfig() if time is None else time,
        "allow_unused": allow_unused,
        "allow_overlap": allow_overlap,
        "seed": seed,
    }
    memory = None if workdir is None else files.absolute(workdir) / "memory"

    def prepare() -> Prepared:
        return Prepared(Federation(data, partition, tiers, **options, memory_folder=memory), data)

    if workdir is None:
        return running.run_in_memory(lambda: as_json(options), prepare, callbacks)
    settings = _MADE_BY | as_json(options)
    result, _ = running.run(
        workdir, settings, prepare, callbacks=callbacks, checkpoints=checkpoints
    )
    return result


def load(workdir: epath.PathLike, tiers: Tiers | Model | None = None) -> Result:
    """The result of a run, from its folder; nothing trains or compiles, no data are read.

    Args:
      workdir: the run folder, of `jfed run` or of `simulate`. Of a run that is not finished the
        latest checkpoint is loaded.
      tiers: what `simulate` was given. Without them its result has `tiers` None, nothing
        `evaluated`, and `variables` as they are stored: dictionaries and lists, with
        texts for keys. `jfed run`'s tiers follow from its settings.

    Returns:
      The result, its variables NumPy arrays. `compile_seconds` and `engine` are those of the
      process that finished the run; 0 and what was asked for if none did.

    Raises:
      RunFolderError: there is no run in the folder, or it saved nothing so far, or is damaged.
      ConfigError: the run was made with other tiers than these.
    """
    path = files.absolute(workdir)
    if not (path / "config.json").exists():
        raise RunFolderError(f"{str(path)!r} holds no run: it has no config.json.")
    settings, _ = read_settings(path)
    summary = files.read_json(path / "summary.json") if growth.has_finished(path) else {}
    try:
        found, evaluation, engine = _rebuilt(settings, tiers)
        engine = EngineConfig(**summary["engine"]) if summary else engine
        seconds = float(summary["compile_seconds"]) if summary else 0.0
        names = list(settings["inputs"]["traffic"])
    except (KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"{str(path)!r} is damaged, or of another version of jfed: {error!r}."
        ) from error
    saved = stored(path)
    variables, sizes = saved.state["server"]["variables"], saved.state["sizes"]
    sent = {n: Traffic(*map(int, row)) for n, row in zip(names, sizes, strict=True)}
    if found is None:
        return Result(saved.history, variables, None, (), sent, seconds, engine)
    like = jax.eval_shape(found.init, jax.random.key(0))
    tested, inputs = evaluated_tiers(found, evaluation), None
    norms: dict[str, Statistics | None] = {}
    if summary:
        inputs, norms = trained.read(path, settings["inputs"]["data"], tested, like)
    return Result(
        history=saved.history,
        variables=in_tree_of(like, variables),
        tiers=found,
        evaluated=tested,
        traffic=sent,
        compile_seconds=seconds,
        engine=engine,
        norms=norms,
        inputs=inputs,
    )


def _rebuilt(
    settings: Mapping[str, Any], given: Tiers | Model | None
) -> tuple[Tiers | None, EvaluationConfig, EngineConfig]:
    """Tiers, evaluation and engine of the run that has this `config.json`."""
    inputs = settings["inputs"]
    found = None if given is None else as_tiers(given)
    if settings.get("made_by") == _MADE_BY["made_by"]:
        tested, engine = settings["evaluation"], EngineConfig(**settings["engine"])
        counts = tuple(c if isinstance(c, int) else tuple(c) for c in tested["iterations"])
        evaluation = EvaluationConfig(iterations=counts, solvers=tuple(tested["solvers"]))
    else:
        classes, channels = inputs["data"]["classes"], inputs["data"]["image_shape"][-1]
        own, evaluation, engine = assembly.rebuild(settings, classes, channels)
        found = own if found is None else found
    if found is not None:
        differing = differences(inputs["tiers"], fingerprints.of_tiers(found))
        if differing:
            raise ConfigError(f"the run was made with other tiers: {'; '.join(differing)}.")
    return found, evaluation, engine
