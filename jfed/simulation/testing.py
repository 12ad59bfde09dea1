"""Tests of the global model and of clients, and what they are done on, on the devices."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jfed.data import Dataset
from jfed.data.preprocessing import Images, in_rows
from jfed.engine.devices import EVERYWHERE, SPREAD, put
from jfed.engine.lanes import Inputs
from jfed.models.losses import Metrics
from jfed.models.model import Params
from jfed.seeds import generator
from jfed.simulation.client_rows import ClientRows
from jfed.simulation.evaluation import EvaluationConfig, Examples, Tested, in_batches
from jfed.simulation.local_tests import Chunk, LocalTesting
from jfed.simulation.programs import (
    Compiled,
    EvaluateArguments,
    Program,
    Specification,
    programs,
)
from jfed.simulation.scores import METRICS, column
from jfed.simulation.training_images import TrainingImages
from jfed.tiers.tier import Tier


class Testing:
    """Tests of the evaluated tiers, and of clients on examples of their own.

    Args:
      spec: of the programs.
      evaluation: how the global model is tested.
      data: with the test set.
      images: training images.
      moments: mean and deviation of their channels.
      calls: of each program that tests clients on examples of their own.
      seed: of the draw of examples that norms are measured on.
    """

    def __init__(
        self,
        spec: Specification,
        evaluation: EvaluationConfig,
        data: Dataset,
        images: TrainingImages,
        moments: tuple[np.ndarray, np.ndarray],
        calls: Sequence[list[Chunk]],
        *,
        seed: int,
    ) -> None:
        self.calls = {Program("local", c.tiers): x for c, x in zip(spec.local, calls, strict=True)}
        self._spec, self._images, self._metrics = spec, images, evaluation.metrics
        size, count, mesh = evaluation.batch_size, evaluation.calibration_examples, spec.mesh
        everywhere = functools.partial(put, mesh=mesh, spec=EVERYWHERE)
        spread = functools.partial(put, mesh=mesh, spec=SPREAD)
        chosen = generator(seed, "calibration").permutation(len(data.train))[:count]
        some, places = images.some(chosen)
        self._calibration = Examples(some, *spread(in_batches(places, size, mesh.size)))
        test = Images(*everywhere((in_rows(data.test.images), data.test.labels, *moments)))
        every, self._labels = np.arange(len(data.test)), data.test.labels
        self._test = Examples(test, *spread(in_batches(every, size, mesh.size)))
        settings = {t.name: jax.tree.map(np.int32, t.setting) for ts in spec.evaluated for t in ts}
        self._settings = everywhere(settings)

    def evaluate(self, compiled: Compiled, variables: Params) -> dict[str, Tested]:
        """Tests of each evaluated tier, arrays on the devices, by name."""
        found: dict[str, Tested] = {}
        for tiers in self._spec.evaluated:
            program = compiled(Program("evaluate", tiers))
            found |= {tier.name: program(*self._of_tier(tier, variables)) for tier in tiers}
        return found

    def score(self, probabilities: np.ndarray) -> dict[str, float]:
        """The metrics that were asked for, of the probabilities of an evaluation, by column."""
        found = probabilities[: len(self._labels)]
        return {column(m): METRICS[m].of(found, self._labels) for m in self._metrics}

    def test_clients(
        self, compiled: Compiled, inputs: Inputs, rows: ClientRows, latest: Any
    ) -> list[tuple[Sequence[int], Metrics]]:
        """Tests of clients on examples of their own: numbers, and arrays on the devices.

        Args:
          compiled: gives the programs.
          inputs: of the round, with the learning rate of fine-tuning.
          rows: of the clients' memory.
          latest: see `State`.
        """
        found: list[tuple[Sequence[int], Metrics]] = []
        for testing in self._spec.local:
            norms, program = None, Program("local", testing.tiers)
            if testing.has_common_norms:
                arguments = inputs.server.variables, self._calibration
                norms = compiled(Program("norms", testing.tiers))(*arguments)
            for chunk in self.calls[program]:
                if testing.streamed and len(found) > 1:  # no more images than of two calls
                    jax.block_until_ready(found[-2][1])
                given = self._of_chunk(testing, chunk, inputs, rows, latest)
                found.append((chunk.clients, compiled(program)(*given, norms)))
        return found

    def arguments(
        self, inputs: Inputs, rows: ClientRows, latest: Any
    ) -> dict[Program, tuple[Any, ...]]:
        """The arguments of every program: those of its first tier or call, or like them."""
        variables = inputs.server.variables
        found: dict[Program, tuple[Any, ...]] = {
            Program("evaluate", tiers): self._of_tier(tiers[0], variables)
            for tiers in self._spec.evaluated
        }
        for testing in self._spec.local:
            norms, program = None, Program("local", testing.tiers)
            if testing.has_common_norms:
                measurer = Program("norms", testing.tiers)
                found[measurer] = variables, self._calibration
                norms = programs(self._spec).shapes(measurer, *found[measurer])
            given = self._of_chunk(testing, self.calls[program][0], inputs, rows, latest)
            found[program] = *given, norms
        return found

    def _of_tier(self, tier: Tier, variables: Params) -> EvaluateArguments:
        return EvaluateArguments(
            variables, self._settings[tier.name], self._calibration, self._test
        )

    def _of_chunk(
        self, testing: LocalTesting, chunk: Chunk, inputs: Inputs, rows: ClientRows, latest: Any
    ) -> tuple[Inputs, Any, Any]:
        memory: Any = ()
        if testing.algorithm.personalise is not None:
            memory = rows.some(chunk.clients, len(chunk.tested.client), latest)
        images = self._images.send(chunk.needed, chunk.images)
        return inputs._replace(images=images), chunk.tested, memory
