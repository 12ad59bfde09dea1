"""Finished runs that commands use."""

import jfed
from jfed.errors import RunFolderError
from jfed.simulation.loop import Result


def load(folder: str) -> Result:
    """The result of a run of `jfed run`; RunFolderError if it has not finished."""
    result = jfed.load(folder)
    if result.tiers is None:
        raise RunFolderError(
            f"the run in {folder!r} is one of jfed.simulate, whose tiers its folder does not hold: "
            "use jfed.load(folder, tiers) in Python, with those that it was trained with."
        )
    if result.inputs is None:
        raise RunFolderError(f"the run in {folder!r} has not finished, so its norms are unknown.")
    return result
