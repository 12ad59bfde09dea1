"""An experiment: several arms with several seeds, each a run folder.

Runs are processes side by side on this machine's cores, or jobs of a Slurm cluster.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import itertools
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import jax

from jfed import files
from jfed.data import load
from jfed.errors import (
    ConfigError,
    DeviceMemoryError,
    DivergedError,
    check_integer,
    check_sequence,
)
from jfed.provenance import cores
from jfed.reports import finished
from jfed.reports.finished import FinishedRun
from jfed.runs import folder, huge_pages, running as runs
from jfed.runs.assembly import set_up
from jfed.runs.compiled import keep_compiled
from jfed.runs.config import RunConfig
from jfed.runs.jobs import Job, JobConfig, Slurm
from jfed.seeds import check_seed
from jfed.settings import as_json
from jfed.simulation.programs import programs

Arms = Mapping[str, RunConfig]
_Key = tuple[str, int]  # arm and seed
_Jobs = Mapping[_Key, tuple[RunConfig, pathlib.Path]]


def run_all(
    arms: Arms,
    workdir: str | os.PathLike[str],
    *,
    seeds: int | Sequence[int] = 3,
    workers: int | None = None,
    on_run: Callable[[Sequence[FinishedRun]], None] = lambda runs: None,
) -> tuple[list[FinishedRun], dict[_Key, str]]:
    """Runs every arm with every seed; what is finished in its folder is only read.

    Compiled programs are kept as `jfed run` keeps them.

    Args:
      arms: settings by name; their own seeds are not used.
      workdir: a run's folder is `workdir/ARM/SEED`.
      seeds: how many, 0, 1, ...; or which.
      workers: processes at a time, each on a core of its own. By default one for each core of a
        CPU, which trains narrow networks faster than all cores at one run. On an accelerator it can
        only be 1: one run after another in this process.
      on_run: called with all that are finished, whenever one more is.

    Returns:
      The finished runs, and how others diverged, by arm and seed.

    Raises:
      ConfigError: no arms, settings that cannot work, or two arms whose names make one folder.
      RunFolderError: a folder belongs to other settings.
      JfedError: see `jfed.runs.running.run`.
    """
    jobs = _jobs(arms, pathlib.Path(workdir), seeds)
    found = _finished(jobs)
    left = {key: job for key, job in jobs.items() if key not in found}
    diverged, began = {}, time.perf_counter()
    for key, why in _run_jobs(left, workers):
        if why is None:
            found[key] = finished.read(jobs[key][1], key[0])
            on_run([found[key] for key in jobs if key in found])
        else:
            diverged[key] = why
        told = why or f"{found[key].average:.2%}"
        count, seconds = len(found) + len(diverged), time.perf_counter() - began
        print(
            f"[{count} of {len(jobs)}] {key[0]}, seed {key[1]}: {told} ({seconds:.0f} s)",
            file=sys.stderr,
        )
    return [found[key] for key in jobs if key in found], diverged


class Submitted(NamedTuple):
    """How the runs of a study are that are jobs of a cluster.

    Attributes:
      runs: those that have finished.
      diverged: how others did, by arm and seed.
      jobs: of those that are left, in the queue.
    """

    runs: list[FinishedRun]
    diverged: dict[_Key, str]
    jobs: dict[_Key, Job]


def submit_all(
    arms: Arms,
    workdir: str | os.PathLike[str],
    settings: JobConfig,
    *,
    seeds: int | Sequence[int] = 3,
) -> Submitted:
    """As `run_all`, but each run is a job of Slurm, and nothing waits for them.

    The same call again reads those that have finished, leaves those in the queue alone, and submits
    those anew that failed or were killed, which go on where they were.

    Args:
      arms: see `run_all`.
      workdir: likewise; a folder that all machines of the cluster see. What a job is and prints is
        in `workdir/jobs/ARM/SEED`.
      settings: what the jobs ask for.
      seeds: see `run_all`.

    Raises:
      ConfigError, RunFolderError: likewise; or Slurm is not there, or refuses a job.
    """
    jobs = _jobs(arms, pathlib.Path(workdir), seeds)
    cluster = Slurm(settings)  # before the folders are looked into: what ends meanwhile is in both
    found, diverged, queued = _finished(jobs), dict[_Key, str](), dict[_Key, Job]()
    for key, (config, path) in jobs.items():
        if key in found:
            continue
        own = pathlib.Path(workdir) / "jobs" / path.relative_to(workdir)
        last = cluster.last(own)
        if last is not None and last.diverged is not None:
            diverged[key] = last.diverged
        elif last is not None and last.state is not None:
            queued[key] = last
        else:
            told = cluster.submit(config, path, own, f"{path.parent.name}-{key[1]}")
            queued[key] = dataclasses.replace(told, failed=last.failed if last else None)
    return Submitted([found[key] for key in jobs if key in found], diverged, queued)


def _finished(jobs: _Jobs) -> dict[_Key, FinishedRun]:
    """The runs that have finished; RunFolderError if a folder is of other settings."""
    return {
        key: finished.read(path, key[0])
        for key, (config, path) in jobs.items()
        if folder.inspect(files.absolute(path), as_json(config)) == "finished"
    }


def _jobs(arms: Arms, workdir: pathlib.Path, seeds: int | Sequence[int]) -> _Jobs:
    """Settings and folder of every run."""
    if isinstance(seeds, Sequence):
        chosen: Sequence[int] = [check_seed(seed) for seed in check_sequence("seeds", seeds)]
    else:
        chosen = range(check_integer("seeds", seeds, least=1))
    if not chosen:
        raise ConfigError(f"an experiment needs at least one seed, got {seeds!r}.")
    if not arms:
        raise ConfigError("an experiment needs at least one arm, got none.")
    names = {arm: arm.replace(" ", "-").replace("/", "-") for arm in arms}
    if len({name.lower() for name in names.values()}) < len(names):
        raise ConfigError(f"arms must have folders of their own, got {list(arms)}.")
    return {
        (arm, seed): (config.replace(seed=seed), workdir / names[arm] / str(seed))
        for seed in chosen
        for arm, config in arms.items()
    }


def _run_jobs(jobs: _Jobs, workers: int | None) -> Iterator[tuple[_Key, str | None]]:
    """Runs all; yields each one's key, and how it diverged if it did, as soon as it ends."""
    cpu = jax.default_backend() == "cpu"
    free_cores = cores()
    workers = check_integer("workers", workers or (len(free_cores) if cpu else 1), least=1)
    if not cpu and workers > 1:
        raise ConfigError(f"an accelerator runs one process at a time, got workers {workers}.")
    workers = min(workers, len(jobs))
    if workers < 2:
        keep_compiled()
        for key, job in jobs.items():
            yield key, _run_job(*job)
        return
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for i in range(workers):
        free.put(free_cores[i % len(free_cores)])
    with _pool(workers, context, free) as pool:
        with huge_pages.for_children():
            futures = {pool.submit(_run_job, *job): key for key, job in jobs.items()}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()


@contextlib.contextmanager
def _pool(
    workers: int, context: Any, free: Any
) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Workers that end at once when anything goes wrong; runs go on from their checkpoints."""
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker, (free,))
    try:
        yield pool
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.kill()
        if isinstance(error, BrokenProcessPool):
            raise DeviceMemoryError(
                f"a worker was killed, perhaps for want of memory; {workers} ran at a time."
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(free: Any) -> None:
    """Gives a worker a core of its own, before JAX counts them, and ends it with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears of Ctrl-C, and ends this
    core = free.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    keep_compiled()


def _end_with_parent() -> None:
    """A worker whose parent was killed would train on, and then wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_DONE, _KEPT = itertools.count(1), 4  # runs, and of how many a process keeps the programs

# Arms follow each other with the same data, which take long to decode.
_load = functools.lru_cache(maxsize=1)(load)


def _run_job(config: RunConfig, path: pathlib.Path) -> str | None:
    """Does one run; returns how it diverged, if it did."""
    try:
        memory = files.absolute(path) / "memory"
        runs.run(path, as_json(config), functools.partial(set_up, config, memory, _load))
    except DivergedError as error:
        return str(error)
    finally:
        if next(_DONE) % _KEPT == 0:
            _forget_programs()
    return None


def _forget_programs() -> None:
    """Gives up the compiled programs of this process: many arms would fill its memory with them."""
    programs.cache_clear()
    jax.clear_caches()
    gc.collect()
