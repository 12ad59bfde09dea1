"""What arms are called: the settings in which they differ, in as few words as tell them apart."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

# Settings that do not tell one arm of an experiment from another.
_SAME_ARM = ("seed", "data_dir", "devices", "lanes", "mapping")
# Those that change nothing in what is trained: tests, checks, where images lie.
_SAME_TRAINING = (
    *("made_by", "allow_overlap", "allow_unused", "images", "unroll"),
    *("eval_every", "eval_iterations", "eval_solvers", "eval_batch_size", "calibration_examples"),
    *("metrics", "measure", "finetune_epochs"),
)
_NAMES = ("algorithm", "method", "model")  # whose values tell what they are of

Settings = Mapping[str, Any]


def arm_labels(runs: Sequence[Settings], defaults: Settings) -> list[str]:
    """What to call each of some runs; alike where they are of one arm.

    A setting at its default is left out, and one that changes nothing in what is trained, unless
    runs would be called alike that are not.

    Args:
      runs: the settings of each, as JSON has them, by name.
      defaults: of settings, by name; others are by default None, or empty.
    """
    differing = _differing(runs)
    trained = [name for name in differing if name not in _SAME_TRAINING]
    if _count(runs, trained) == _count(runs, differing):
        differing = trained

    def is_told(name: str, value: Any) -> bool:
        return value != defaults[name] if name in defaults else value not in (None, [])

    def label(run: Settings) -> str:
        told = {n: run[n] for n in differing if n in run and is_told(n, run[n])}
        if not told and len(differing) == 1:
            told = {n: run[n] for n in differing if run.get(n) not in (None, [])}
        return _text(told) or "default"

    if not differing:
        return ["all"] * len(runs)
    found = list(map(label, runs))
    if len(set(found)) == _count(runs, differing):
        return found
    return [_text({n: run[n] for n in differing if n in run}) or "default" for run in runs]


def _count(runs: Sequence[Settings], names: Sequence[str]) -> int:
    """How many runs these settings tell apart."""
    return len({json.dumps([run.get(name) for name in names]) for run in runs})


def _differing(runs: Sequence[Settings]) -> list[str]:
    asked = {name for run in runs for name in run if not name.endswith("digest")}
    found = [name for name in sorted(asked - set(_SAME_ARM)) if _count(runs, [name]) > 1]
    # What a run is made of follows from its settings, except for tiers of the user's own; and what
    # an algorithm of `simulate` does, from its name.
    for part, but in (("inputs.", ""), ("algorithm.", "algorithm.name")):
        found = [n for n in found if not n.startswith(part) or n == but] or found
    return found


def _text(settings: Settings) -> str:
    """Settings as users type them, without slashes, which tell sections of an experiment apart."""
    parts = [
        _typed(value) if name in _NAMES and value else f"{name} {_typed(value)}"
        for name, value in settings.items()
    ]
    return ", ".join(parts).replace("/", ":")


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_word, value)) or "none"
    return "none" if value is None else str(value)


def _word(value: Any) -> str:
    """One of several values: an optimizer's argument, b1=0.9, or counts per stage, 3-2-2."""
    if not isinstance(value, list):
        return str(value)
    return ("=" if isinstance(value[0], str) else "-").join(map(str, value))
