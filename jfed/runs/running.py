"""A run on disk: the folder that it writes, and goes on from."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from jfed import data as data_lib
from jfed import files
from jfed.errors import PreemptedError, RunFolderError
from jfed.provenance import hardware, made_with
from jfed.reports import plots
from jfed.reports.summary import TierSummary, save_figures, summarise, to_json
from jfed.runs import folder
from jfed.runs.assembly import set_up
from jfed.runs.checkpoints import Checkpoint, CheckpointConfig, Checkpoints
from jfed.runs.config import RunConfig
from jfed.simulation import loop as simulation
from jfed.simulation.federation import Federation
from jfed.simulation.loop import Result
from jfed.simulation.records import CsvWriter, Record, Writer, csv_text


def run(
    config: RunConfig,
    workdir: epath.PathLike,
    *,
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

    Args:
      config: of the run.
      workdir: the folder, of any kind that etils knows (`gs://` too).
      writers: makes writers of records beside `metrics.csv`, given how many rounds are done.
      checkpoints: when to save.
      stop: asked often; once it says True, the run saves and ends with PreemptedError.

    Raises:
      RunFolderError: the folder belongs to other settings, or to another process, or to no run, or
        cannot be read or written.
      PreemptedError: `stop` said so, or the cluster's preemption notice.
      JfedError: see `jfed.runs.assembly.set_up` and `jfed.simulate`.
    """
    path, settings = files.absolute(workdir), folder.as_json(config)
    _inspect(path, settings)
    where = hardware()  # before anything on the disk can change
    federation, data, network = set_up(config)
    saver = functools.partial(Checkpoints, path / "checkpoints", checkpoints or CheckpointConfig())
    with _alone(path), folder.explain_disk(path), simulation.explain_memory(federation):
        found, has_saved = _inspect(path, settings)
        saved = _restore(federation, saver) if has_saved else None
        if found == "finished" and saved is None:
            raise RunFolderError(
                f"the run in {str(path)!r} has finished, but its checkpoints are gone; choose "
                "another folder, or remove it to run anew."
            )
        if saved is None or len(saved.history) < config.rounds:
            federation.compile()  # what a model cannot do shows while it is traced
        if found == "begun" and _writes():
            folder.warn_of_others(path, made_with(where))
        if found == "nothing" and _writes():
            _begin(path, federation, data)
            folder.write_settings(path, settings, made_with(where))
        with contextlib.closing(saver()) as saves:
            result = _rounds(federation, path, saved, saves, writers, stop)
        table = summarise(config, network, result, data.image_shape)
        if found != "finished" and _writes():
            save_figures(path, result, table)
            files.write_json(path / "summary.json", to_json(config, data, result, table, where))
    return result, table


def _inspect(path: epath.Path, settings: dict[str, Any]) -> tuple[str, bool]:
    """What `folder.inspect` finds, and whether there are checkpoints, as the first host sees it."""
    found = folder.inspect(path, settings) if _writes() else folder.FOUND[0]
    seen = folder.FOUND.index(found), (path / "checkpoints").exists()
    state, saved = multihost_utils.broadcast_one_to_all(np.asarray(seen, np.int32)).tolist()
    return folder.FOUND[state], bool(saved)


def _writes() -> bool:
    """Whether this process writes files: of several hosts the first one. Checkpoints need all."""
    return jax.process_index() == 0


def _alone(path: epath.Path) -> contextlib.AbstractContextManager[None]:
    return folder.claim(path) if _writes() else contextlib.nullcontext()


def _begin(path: epath.Path, federation: Federation, data: data_lib.Dataset) -> None:
    """Draws what a run begins with."""
    partition = federation.population.partition
    counts = data_lib.class_counts(data.train.labels, partition, data.num_classes)
    plots.save(plots.classes_by_client(counts, data.class_names), path / "clients.png")


def _restore(federation: Federation, saver: Callable[[], Checkpoints]) -> Checkpoint | None:
    """The run's latest intact checkpoint, if it ever had one."""
    with contextlib.closing(saver()) as checkpoints:
        saved = checkpoints.latest(federation.state_shapes)
    done = 0 if saved is None else len(saved.history)
    if done != multihost_utils.broadcast_one_to_all(np.int32(done)):
        raise RunFolderError(
            f"this host restored round {done}, the first one another: the run folder must be one "
            "that all hosts share."
        )
    return None if saved is None else saved._replace(state=federation.place(saved.state))


def _rounds(
    federation: Federation,
    path: epath.Path,
    saved: Checkpoint | None,
    checkpoints: Checkpoints,
    make_writers: Callable[[int], Sequence[Writer]],
    stop: Callable[[], bool],
) -> Result:
    """Runs what is left of a run."""
    history = list(saved.history) if saved else []
    last, kept = (saved.state, len(history)) if saved else (federation.start, 0)
    with _writers(federation, path, history, make_writers) as writers:
        for state, record in simulation.iterate(federation, tuple(history), last, stop):
            last = state
            history.append(record)
            for writer in writers:
                writer.write(record)
            preempted = multihost_utils.reached_preemption_sync_point(record.round)
            if preempted or record.round % checkpoints.every == 0:
                checkpoints.save(last, history)
                kept = record.round
                for writer in writers:
                    if isinstance(writer, CsvWriter):
                        writer.flush()
            if preempted:
                break
        if kept < len(history):
            checkpoints.save(last, history)
        checkpoints.wait()
    if len(history) < federation.rounds:
        raise PreemptedError(
            f"stopped after round {len(history)} of {federation.rounds}, which is saved in "
            f"{str(path)!r}; the same command goes on from there."
        )
    return simulation.make_result(federation, last, history)


@contextlib.contextmanager
def _writers(
    federation: Federation,
    path: epath.Path,
    history: Sequence[Record],
    make: Callable[[int], Sequence[Writer]],
) -> Iterator[Sequence[Writer]]:
    """The writers of a run, `metrics.csv` first, whose lines become those of `history`."""
    if not _writes():
        yield ()
        return
    names, csv = [tier.name for tier in federation.evaluated], path / "metrics.csv"
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
