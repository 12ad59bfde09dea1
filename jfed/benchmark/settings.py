"""What a run of the benchmark is asked to do, checked before anything is started."""

import dataclasses
import pathlib

import tyro

from jfed.errors import ConfigError, check_integer, check_sequence, one_of
from jfed.seeds import check_seed

SECTIONS = ("cnn", "ode", "scaling", "accelerator")
SCALES = ("full", "smoke")
_REPEATS = {"full": 5, "smoke": 1}
_PAUSE = {"full": 0.5, "smoke": 0.0}


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run of the benchmark.

    Attributes:
      sections: some of cnn, ode, scaling and accelerator; without any, those that suit the backend.
      scale: "full", or "smoke" for sizes that only show that everything works.
      repeats: timed rounds of each contender; None for the scale's own, 5 and 1.
      slow: also time vmap over clients with XLA's convolution, one round.
      force: run the accelerator section without an accelerator.
      only: leave out contenders whose name contains none of these texts.
      seed: of data, weights and orders.
    """

    sections: tyro.conf.Positional[tuple[str, ...]] = ()
    scale: str = "full"
    repeats: int | None = None
    slow: bool = False
    force: bool = False
    only: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_sequence("only", self.only)
        for section in check_sequence("sections", self.sections):
            one_of("benchmark section", section, SECTIONS)
        one_of("scale", self.scale, SCALES)
        if self.repeats is not None:
            check_integer("repeats", self.repeats, least=1)
        check_seed(self.seed)

    @property
    def rounds(self) -> int:
        """Timed rounds of each contender."""
        return _REPEATS[self.scale] if self.repeats is None else self.repeats

    @property
    def pause(self) -> float:
        """Seconds between two turns."""
        return _PAUSE[self.scale]

    def chosen(self, platform: str) -> tuple[str, ...]:
        """The sections to run; ConfigError if one does not suit the platform."""
        if not self.sections:
            return ("cnn", "ode", "scaling") if platform == "cpu" else ("scaling", "accelerator")
        if "accelerator" in self.sections and platform == "cpu" and not self.force:
            raise ConfigError(
                "section 'accelerator' needs a GPU or TPU, and JAX's backend is 'cpu'; "
                "--force runs it all the same."
            )
        return tuple(dict.fromkeys(self.sections))


def check_output(folder: pathlib.Path) -> None:
    """Raises ConfigError unless the folder is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"the output folder {str(folder)!r} exists already and is not an empty folder; "
            "choose another one with --output, or remove it."
        )
