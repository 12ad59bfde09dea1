"""A run on disk: the folder that it writes, and goes on from."""

import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from etils import epath
from jax.experimental import multihost_utils

from jfed import data as data_lib, files
from jfed.engine import hosts
from jfed.errors import CallbackError, ConfigError, PreemptedError, RunFolderError
from jfed.provenance import hardware, made_with
from jfed.reports import plots
from jfed.reports.summary import TierSummary, save_figures, summarise, to_json
from jfed.runs import fingerprints, folder, growth, trained
from jfed.runs.assembly import Prepared
from jfed.runs.checkpoints import Checkpoint, CheckpointConfig, Checkpoints
from jfed.settings import write_settings
from jfed.simulation import loop as simulation
from jfed.simulation.federation import Federation, State
from jfed.simulation.loop import Callback, Result
from jfed.simulation.records import CsvWriter, Record, Writer, csv_text

_T = TypeVar("_T")


def run(
    workdir: epath.PathLike,
    settings: Mapping[str, Any],
    prepare: Callable[[], Prepared],
    *,
    callbacks: Sequence[Callback] = (),
    writers: Callable[[int], Sequence[Writer]] = lambda done: (),
    checkpoints: CheckpointConfig | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Result, list[TierSummary]]:
    """Runs a federation in a folder, or goes on with the run that is in it.

    The folder holds `config.json`, `metrics.csv` (a line a round, written as rounds end),
    `checkpoints/`, and at the end `summary.json` and figures: accuracy over rounds and bytes,
    against FLOPs, and for iteration counts against those. It is made only after all settings
    and the data were checked, and taken away again if the model cannot be compiled. A finished run
    is read, and nothing changes.

    Of several hosts the first one writes. Whatever one of them finds wrong, at any time, ends all,
    see `jfed.engine.hosts`.

    Args:
      workdir: the folder, of any kind that etils knows (`gs://` too).
      settings: what `config.json` holds, as plain values, beside digests of data, partition and
        tiers: all that decides the outcome.
      prepare: sets up the federation that they describe.
      callbacks: called with each record, on every host.
      writers: makes writers of records beside `metrics.csv`, given how many rounds are done; on the
        first host only.
      checkpoints: when to save.
      stop: asked often; once it says True, the run saves and ends with PreemptedError.

    Raises:
      RunFolderError: the folder belongs to other settings, or to another process, or to no run, or
        cannot be read or written.
      CallbackError: a callback raised; the last round is saved.
      PreemptedError: `stop` said so, or the cluster's preemption notice.
      JfedError: see `prepare` and `jfed.simulate`.
    """
    path = files.absolute(workdir)
    hosts.same("versions and settings", lambda: {**_versions(), **settings})
    _inspect(path, settings)
    where = hosts.agree("finding devices", hardware)  # before anything on the disk can change
    federation, data, twin = hosts.agree("setting up", prepare)
    inputs = hosts.agree("reading the data", lambda: fingerprints.inputs(data, federation))
    hosts.same("what they train on", lambda: inputs)
    settings = {**settings, "inputs": inputs}
    phase = functools.partial(_phase, path, federation)
    config, made = checkpoints or CheckpointConfig(), made_with(where)
    saves = Checkpoints(path / "checkpoints", config, made)
    with contextlib.closing(saves), contextlib.ExitStack() as stack:
        phase("claiming the run folder", lambda _: stack.enter_context(_alone(path)))
        found, has_saved = _inspect(path, settings)
        saved = _restore(federation, saves, phase) if has_saved else None
        if found == "finished" and saved is None:
            raise RunFolderError(
                f"the run in {str(path)!r} has finished, but its checkpoints are gone; choose "
                "another folder, or remove it to run anew."
            )
        if saved is None or len(saved.history) < federation.rounds:
            # What a model cannot do shows while it is traced.
            phase("compiling", lambda _: federation.compile())
        if found == "begun":
            was = saved.made_with if saved else None
            phase("going on", lambda _: _go_on(path, settings, made, was))
        if found == "nothing":
            phase("beginning", lambda _: _begin(path, settings, federation, data, made))
        start = functools.partial(_rounds, federation, path, saved, saves, callbacks, writers, stop)
        result = phase("the rounds", lambda check: start(check))

        if found == "finished":
            before = result
            result = phase("reading norms", lambda _: _with_norms(path, settings, before))
        table = phase(
            "the summary", lambda _: summarise(federation, result, data.image_shape, twin)
        )
        if found != "finished":
            about = functools.partial(to_json, data, seed=federation.seed, hardware=where)
            phase("writing the summary", lambda _: _finish(path, result, table, about))
    return result, table


def run_in_memory(
    settings: Callable[[], Mapping[str, Any]],
    prepare: Callable[[], Prepared],
    callbacks: Sequence[Callback] = (),
) -> Result:
    """As `run`, without a folder; the settings are compared among hosts, and else not needed."""
    hosts.same("versions and settings", lambda: {**_versions(), **settings()})
    federation, data, _ = hosts.agree("setting up", prepare)
    hosts.same("what they train on", lambda: fingerprints.inputs(data, federation))
    phase = hosts.Phase("the rounds")

    def stopped() -> bool:
        phase.check()
        return False

    return phase.run(lambda: simulation.run(federation, callbacks, stopped))


def _versions() -> dict[str, str]:
    return {"jfed": importlib.metadata.version("jfed"), "jax": jax.__version__}


def _phase(
    path: epath.Path,
    federation: Federation,
    what: str,
    function: Callable[[Callable[[], None]], _T],
) -> _T:
    """A phase of all hosts, which the function may ask how the others do."""
    begun = hosts.Phase(what)

    def explained() -> _T:
        with folder.explain_disk(path), simulation.explain_memory(federation):
            return function(begun.check)

    return begun.run(explained)


def _inspect(path: epath.Path, settings: Mapping[str, Any]) -> tuple[str, bool]:
    """What `folder.inspect` finds, and whether there are checkpoints, as the first host sees it."""

    def look() -> tuple[str, bool] | None:
        if not hosts.is_first():
            return None
        return folder.inspect(path, settings), (path / "checkpoints").exists()

    found, has_saved = hosts.gather("looking into the run folder", look)[0]
    return found, has_saved


def _alone(path: epath.Path) -> contextlib.AbstractContextManager[None]:
    return folder.claim(path) if hosts.is_first() else contextlib.nullcontext()


def _go_on(
    path: epath.Path, settings: Mapping[str, Any], made: Mapping[str, Any], was: Any
) -> None:
    """Tells what made the folder, where that differs; writes down settings that have grown."""
    if hosts.is_first():
        folder.warn_of_others(path, made, was)
        growth.grow(path, settings)


def _begin(
    path: epath.Path,
    settings: Mapping[str, Any],
    federation: Federation,
    data: data_lib.Dataset,
    made: Mapping[str, Any],
) -> None:
    """Writes what a run begins with; `config.json` last, which makes the folder a run's."""
    if not hosts.is_first():
        return
    partition = federation.population.partition
    counts = data_lib.class_counts(data.train.labels, partition, data.num_classes)
    figure = plots.classes_by_client(counts, data.class_names, federation.client_names)
    plots.save(figure, path / "clients.png")
    write_settings(path, settings, made)


def _with_norms(path: epath.Path, settings: Mapping[str, Any], result: Result) -> Result:
    """The result of a finished run, which tests nothing any more, with the norms in its folder."""
    like = result.variables
    inputs, norms = trained.read(path, settings["inputs"]["data"], result.evaluated, like)
    return dataclasses.replace(result, inputs=inputs, norms=norms)


def _finish(
    path: epath.Path,
    result: Result,
    table: Sequence[TierSummary],
    about: Callable[..., dict[str, Any]],
) -> None:
    """Writes what a run ends with; `summary.json` last, which makes it a finished one."""
    if hosts.is_first():
        save_figures(path, result, table)
        assert result.inputs is not None
        trained.write(path, result.inputs, result.norms)
        files.write_json(path / "summary.json", about(result, table))


def _restore(
    federation: Federation, checkpoints: Checkpoints, phase: Callable[..., Any]
) -> Checkpoint | None:
    """The run's latest intact checkpoint, if it ever had one: the first host's choice."""

    def choose() -> Checkpoint | None:
        if not hosts.is_first():
            return None
        return checkpoints.latest(federation.state_shapes)

    saved = phase("restoring", lambda _: choose())
    rounds = hosts.gather("restoring", lambda: len(saved.history) if saved else 0)[0]
    if not rounds:
        return None

    def place() -> Checkpoint:
        if saved is not None:
            return saved._replace(state=federation.place(saved.state))
        try:
            found = checkpoints.load(rounds, federation.state_shapes)
        except Exception as error:
            raise RunFolderError(
                f"cannot read round {rounds}, which the first host restored: {error}. The run "
                "folder must be one that all hosts share."
            ) from error
        return found._replace(state=federation.place(found.state))

    return phase("restoring", lambda _: place())


class _Progress:
    """How far a run on disk is, and what of it is saved.

    Attributes:
      history: records of the rounds done.
      state: after the last of them; None where it was given to the next round.
    """

    def __init__(
        self, federation: Federation, saved: Checkpoint | None, checkpoints: Checkpoints
    ) -> None:
        self.history = list(saved.history) if saved else []
        self.state: State | None = saved.state if saved else federation.start
        self._saved, self._checkpoints = len(self.history), checkpoints
        self._memory, self._superseded = federation.memory, collections.deque[Any]()

    def is_due(self, round_: int) -> bool:
        """Whether the state after a round is to be saved."""
        return round_ % self._checkpoints.every == 0

    def add(self, state: State | None, record: Record) -> None:
        self.state = state
        self.history.append(record)

    def save(self) -> None:
        """Begins to save; drops the rows of client memory that no checkpoint needs any more."""
        assert self.state is not None  # `is_due` asked for it, and the last one always is
        if hosts.is_first():
            self._checkpoints.save(self.state, self.history)
        self._saved = len(self.history)
        if self._memory is not None:
            self._superseded.append(self.state.latest)
            if len(self._superseded) > self._checkpoints.keep:
                self._memory.forget(self._superseded.popleft())

    def finish(self) -> None:
        """Saves what is not saved yet, and waits until all is."""
        if self._saved < len(self.history):
            self.save()
        self._checkpoints.wait()


def _rounds(
    federation: Federation,
    path: epath.Path,
    saved: Checkpoint | None,
    checkpoints: Checkpoints,
    callbacks: Sequence[Callback],
    make_writers: Callable[[int], Sequence[Writer]],
    stop: Callable[[], bool],
    check: Callable[[], None],
) -> Result:
    """Runs what is left of a run; `check` raises if another host has failed."""
    done = _Progress(federation, saved, checkpoints)
    failure: CallbackError | ConfigError | None = None
    preempted = False

    def stopped() -> bool:
        check()
        return preempted or failure is not None or stop()

    with _writers(federation, path, done.history, make_writers) as writers:
        rounds = simulation.iterate(
            federation, tuple(done.history), done.state, stopped, keep=done.is_due
        )
        try:
            for state, record in rounds:
                done.add(state, record)
                for writer in writers:
                    writer.write(record)
                if failure is None:
                    failure = _failure(callbacks, record)
                if done.is_due(record.round):
                    done.save()
                    for writer in writers:
                        if isinstance(writer, CsvWriter):
                            writer.flush()
                preempted = preempted or multihost_utils.reached_preemption_sync_point(record.round)
        except ConfigError as error:  # of a sampler or a schedule of the user's own
            if done.state is None:  # another host's, in the middle of the rounds
                raise
            failure = error
        if failure is None:  # else other hosts, which do not stop here, hear of it
            hosts.agree("saving", done.finish)  # so that no host leaves before the first one has
        else:
            done.finish()
    rounds_done = len(done.history)
    saved_now = f"round {rounds_done} of {federation.rounds}, which is saved in {str(path)!r}"
    if failure is not None:
        again = "the same call goes on from there"
        if isinstance(failure, ConfigError):  # which the same function would raise again
            again = (
                "with the function mended the same call goes on from there, unless it was made "
                "inside of another one, whose code settings have, too. That is another run, in "
                "another folder, which may begin with these variables: "
                "jfed.tiers.start_from(tiers, jfed.load(folder).variables)"
            )
        raise type(failure)(f"{failure} Stopped after {saved_now}; {again}.") from failure.__cause__
    if rounds_done < federation.rounds:
        raise PreemptedError(f"stopped after {saved_now}; the same command goes on from there.")
    assert done.state is not None
    if not federation.norms and growth.rounds_done(path) < federation.rounds:
        federation.evaluate(done.state)  # it was stopped between its last round and its end
    return simulation.make_result(federation, done.state, done.history)


def _failure(callbacks: Sequence[Callback], record: Record) -> CallbackError | None:
    """Calls the callbacks; what went wrong, if anything did."""
    try:
        simulation.tell(callbacks, record)
    except CallbackError as error:
        return error
    return None


@contextlib.contextmanager
def _writers(
    federation: Federation,
    path: epath.Path,
    history: Sequence[Record],
    make: Callable[[int], Sequence[Writer]],
) -> Iterator[Sequence[Writer]]:
    """The writers of a run, `metrics.csv` first, whose lines become those of `history`."""
    if not hosts.is_first():
        yield ()
        return
    names, csv = federation.columns, path / "metrics.csv"
    text, there = csv_text(names, history).encode(), csv.read_bytes() if csv.exists() else b""
    if history and not there.startswith(text):
        warnings.warn(f"{csv} was damaged; rewritten from the checkpoint", stacklevel=2)
    if len(history) == federation.rounds and there == text:
        yield ()
        return
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(contextlib.closing(CsvWriter(csv, names, history)))
        others = make(len(history))
        for writer in others:
            stack.callback(writer.close)
        yield [lines, *others]
