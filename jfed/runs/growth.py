"""Runs that go on with more rounds, or with settings that change nothing in what comes out."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from jfed import files
from jfed.algorithms.clients import SCHEDULES
from jfed.errors import RunFolderError
from jfed.settings import differences, flat, read_settings, write_settings

# Settings that may be others when a run goes on: where it is done, and when it is looked at.
_FREE = (
    *(f"engine.{name}" for name in ("devices", "lanes", "mapping", "images")),
    "evaluation.every",
)
_ROUNDS, _RESTART = "rounds", "client.restart_schedule"


def differing(folder: epath.Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The settings for which a run cannot go on, with the values of both; see `differences`.

    More rounds than it has are no difference, if what it did so far does not depend on how many
    they are.

    Raises:
      RunFolderError: they do, with what could be done; or there are fewer than it did already.
    """
    names = {line.partition(" is ")[0]: line for line in differences(there, here)}
    for name in _FREE:
        names.pop(name, None)
    if _ROUNDS in names:
        _check_rounds(folder, flat(there), flat(here))
        del names[_ROUNDS]
        names.pop(_RESTART, None)
    return list(names.values())


def rounds_done(folder: epath.Path) -> int:
    """How many rounds the run had when it finished; 0 if it never has."""
    summary = folder / "summary.json"
    return int(files.read_json(summary).get("rounds", 0)) if summary.exists() else 0


def has_finished(folder: epath.Path) -> bool:
    """Whether the run did all the rounds that it has by now."""
    return rounds_done(folder) == read_settings(folder)[0]["rounds"]


def grow(folder: epath.Path, settings: Mapping[str, Any]) -> None:
    """Writes how many rounds a run has from now on, and whose learning rate they have."""
    there, made_with = read_settings(folder)
    if there[_ROUNDS] != settings[_ROUNDS]:
        client = there["client"] | {"restart_schedule": settings["client"]["restart_schedule"]}
        changed = {_ROUNDS: settings[_ROUNDS], "client": client}
        write_settings(folder, there | changed, made_with)


def _check_rounds(folder: epath.Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    old, new, where = there[_ROUNDS], here[_ROUNDS], f"the run in {str(folder)!r}"
    if new < old:
        raise RunFolderError(f"{where} has {old} rounds, got {new}; a run can only get more.")
    if here.get("privacy.epsilon") is not None:
        raise RunFolderError(
            f"{where} has noise for dp_epsilon {here['privacy.epsilon']!r} after {old} rounds; "
            f"{new} would spend more."
        )
    schedule = here["client.schedule"]
    if schedule in SCHEDULES and schedule != "constant" and here[_RESTART] != old:
        raise RunFolderError(
            f"{where} has a learning rate that ends with its {old} rounds (schedule "
            f"{schedule!r}), so {new} would be another run. To go on from there with a schedule "
            f"that begins anew, give --restart-schedule {old}."
        )
