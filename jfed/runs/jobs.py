"""Runs as jobs of a Slurm cluster, through submitit.

A job does one run in its run folder, which the machine that submits and those that run it must
both see. When its time is nearly over, or it has to make room (submitit's signal, SIGUSR2), the run
saves and the job goes back into the queue by itself, under its own number; after a SIGTERM it saves
and ends. A job that ended otherwise is noticed by who asks: Slurm's queue does not have it.
"""

import dataclasses
import functools
import os
import pathlib
import re
import signal
import subprocess
from collections.abc import Mapping
from typing import Any

from jfed import files
from jfed.engine.devices import use_cores
from jfed.errors import (
    ConfigError,
    DivergedError,
    PreemptedError,
    check_integer,
    check_number,
    check_sequence,
    optional,
)
from jfed.runs import huge_pages, running as runs
from jfed.runs.assembly import set_up
from jfed.runs.compiled import keep_compiled
from jfed.runs.config import RunConfig
from jfed.settings import as_json


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """What each job asks Slurm for.

    Attributes:
      partition: by name; the cluster's default one where not given.
      minutes: until the run has to save and queue again, 5 or more. Slurm warns up to two and a
        half before, and a job that has hardly begun would not hear it.
      cpus: cores; without a GPU up to 8 of them are the run's devices.
      gpus: how many.
      memory: in GB; what the cluster gives where not given.
      timeouts: how often a job may reach its time limit and go on.
      slurm_args: other options of `sbatch`, such as account=vision, qos=low or exclusive.
    """

    partition: str | None = None
    minutes: int = 60
    cpus: int = 1
    gpus: int = 0
    memory: float | None = None
    timeouts: int = 10
    slurm_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_integer("minutes", self.minutes, least=5)
        check_integer("cpus", self.cpus, least=1)
        check_integer("gpus", self.gpus, least=0)
        check_integer("timeouts", self.timeouts, least=0)
        if self.memory is not None:
            check_number("memory", self.memory, above=0.0)
        for option in check_sequence("slurm_args", self.slurm_args):
            if not re.fullmatch(r"[a-z][a-z-]*(=.+)?", str(option)):
                raise ConfigError(
                    f"slurm_args must look like qos=low or exclusive, got {option!r}."
                )

    def options(self) -> dict[str, Any]:
        """What `submitit.SlurmExecutor.update_parameters` takes, for what was given."""
        others: dict[str, Any] = {"requeue": True}
        for option in self.slurm_args:
            name, given, value = option.partition("=")
            others[name] = value if given else True
        asked = {
            "partition": self.partition,
            "time": self.minutes,
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus or None,
            "mem": self.memory and f"{round(self.memory * 1024)}MB",
            "stderr_to_stdout": True,
            "additional_parameters": others,
        }
        return {name: value for name, value in asked.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class RunJob:
    """What a job does: one run, or what is left of it.

    Attributes:
      config: of the run.
      folder: the run folder, as a full path.
      cpus: see `JobConfig`.
    """

    config: RunConfig
    folder: pathlib.Path
    cpus: int

    def __call__(self) -> str | None:
        """Does the run; returns how it diverged, if it did."""
        use_cores(self.cpus)
        keep_compiled()
        again, heard = _signal_of_submitit(), set[int]()
        before = {
            number: signal.signal(number, lambda number, _: heard.add(number))
            for number in (again, signal.SIGTERM)
        }
        memory = files.absolute(self.folder) / "memory"
        prepare = functools.partial(set_up, self.config, memory)
        try:
            runs.run(self.folder, as_json(self.config), prepare, stop=lambda: bool(heard))
        except DivergedError as error:
            return str(error)
        except PreemptedError:
            if again in heard:
                before[again](again, None)  # type: ignore[operator,misc]  # it queues, and ends this
            raise
        return None

    def checkpoint(self) -> Any:
        """What submitit puts into the queue in place of this: the same."""
        return optional("submitit", "slurm").helpers.DelayedSubmission(self)


def _signal_of_submitit() -> signal.Signals:
    """That which Slurm sends before it ends a job."""
    return signal.Signals[f"SIG{optional('submitit', 'slurm').JobEnvironment.USR_SIG}"]


@dataclasses.dataclass(frozen=True)
class Job:
    """What became of the last job of a run.

    Attributes:
      number: Slurm's.
      state: in Slurm's queue, such as RUNNING; None once it is not there any more.
      diverged: how its run did, if it did.
      failed: why it ended without one of these; None where it did not, or did all.
    """

    number: str
    state: str | None
    diverged: str | None = None
    failed: str | None = None


class Slurm:
    """The jobs of a study in Slurm's queue, as it is when this is made.

    Args:
      settings: what the jobs ask for.

    Raises:
      ConfigError: submitit or Slurm is not there, or Slurm does not answer.
    """

    def __init__(self, settings: JobConfig) -> None:
        self._submitit = optional("submitit", "slurm")
        self._settings = settings
        self._queue = _queue()

    def last(self, folder: pathlib.Path) -> Job | None:
        """What became of the last job that was submitted with this folder, if there is one."""
        found = sorted(folder.glob("*_submitted.pkl"), key=os.path.getmtime)
        if not found:
            return None
        number = found[-1].name.partition("_")[0]
        if number in self._queue:
            return Job(number, self._queue[number])
        job = self._submitit.SlurmJob(folder, number)
        if not job.paths.result_pickle.exists():
            return Job(number, None, failed=f"it was killed; see {job.paths.stdout}")
        if (error := job.exception()) is not None:
            return Job(number, None, failed=_last_error(str(error)))
        return Job(number, None, diverged=job.result())

    def submit(self, config: RunConfig, run: pathlib.Path, folder: pathlib.Path, name: str) -> Job:
        """Submits a job for a run.

        Args:
          config: of the run.
          run: its folder.
          folder: for the job's own files: what it does, what it prints.
          name: for Slurm's queue.

        Raises:
          ConfigError: Slurm refuses it.
        """
        executor = self._submitit.SlurmExecutor(folder, max_num_timeout=self._settings.timeouts)
        executor.update_parameters(job_name=name, **self._settings.options())
        try:
            with huge_pages.for_children():  # Slurm hands the environment on
                job = executor.submit(RunJob(config, run.absolute(), self._settings.cpus))
        except self._submitit.core.utils.FailedJobError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ConfigError(f"Slurm refuses the job {name!r}: {reason}") from error
        return Job(job.job_id, "PENDING")


def _last_error(trace: str) -> str:
    """The line of a traceback that says what went wrong."""
    found = [line for line in trace.splitlines() if re.match(r"[\w.]+Error\b", line)]
    return found[-1] if found else trace


def _queue() -> Mapping[str, str]:
    """The state of each of the user's jobs that has not ended, by its number."""
    command = ["squeue", "--noheader", "--me", "--format=%A %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise ConfigError("Slurm is not on this machine: there is no command squeue.") from None
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"Slurm does not answer: {error.stderr.strip()}") from error
    return dict(line.split() for line in done.stdout.splitlines())
