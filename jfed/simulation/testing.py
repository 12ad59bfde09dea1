"""Tests of the global model and of clients, and what they are done on, on the devices."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jfed.data import Dataset
from jfed.data.preprocessing import Images, ModelInputs, in_rows
from jfed.engine.devices import EVERYWHERE, SPREAD, put
from jfed.models.losses import Metrics
from jfed.models.model import Params
from jfed.seeds import generator
from jfed.simulation.client_rows import ClientRows
from jfed.simulation.evaluation import EvaluationConfig, Examples, Tested, in_batches
from jfed.simulation.local_tests import Chunk, LocalTesting
from jfed.simulation.programs import (
    Arguments,
    Compiled,
    EvaluateArguments,
    Program,
    RoundStart,
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
      images: the training set.
      rows: of clients' memory.
      calls: of each program that tests clients.
      evaluation: how large batches are, and what is measured.
      data: with the test set.
      inputs: with the moments of the channels.
      seed: of the draw of examples that norms are measured on.
    """

    def __init__(
        self,
        spec: Specification,
        images: TrainingImages,
        rows: ClientRows,
        calls: Mapping[Program, Sequence[Chunk]],
        evaluation: EvaluationConfig,
        data: Dataset,
        inputs: ModelInputs,
        seed: int,
    ) -> None:
        self._spec, self._images, self._rows, self.calls = spec, images, rows, calls
        self._metrics, self._labels = evaluation.metrics, data.test.labels
        everywhere = functools.partial(put, mesh=spec.mesh, spec=EVERYWHERE)

        def spread(chosen: np.ndarray) -> Any:
            batches = in_batches(chosen, evaluation.batch_size, spec.mesh.size)
            return put(batches, spec.mesh, SPREAD)

        chosen = generator(seed, "calibration").permutation(len(data.train))
        some, places = images.some(chosen[: evaluation.calibration_examples])
        self._calibration = Examples(some, *spread(places))
        test = in_rows(data.test.images), self._labels, inputs.mean, inputs.std
        self._test = Examples(Images(*everywhere(test)), *spread(np.arange(len(data.test))))
        tiers = [tier for group in spec.evaluated for tier in group]
        self._settings = everywhere({t.name: jax.tree.map(np.int32, t.setting) for t in tiers})

    def evaluate(self, compiled: Compiled, variables: Params) -> dict[str, Tested]:
        """Tests of each evaluated tier, arrays on the devices, by name."""
        return {
            tier.name: compiled(Program("evaluate", tiers))(*self._of_tier(tier, variables))
            for tiers in self._spec.evaluated
            for tier in tiers
        }

    def score(self, probabilities: np.ndarray) -> dict[str, float]:
        """The metrics that were asked for, of the probabilities of an evaluation, by column."""
        found = probabilities[: len(self._labels)]
        return {column(m): METRICS[m].of(found, self._labels) for m in self._metrics}

    def test_clients(
        self, compiled: Compiled, start: RoundStart
    ) -> list[tuple[Sequence[int], Metrics]]:
        """Tests of clients: their numbers, and arrays on the devices.

        Args:
          compiled: gives the programs.
          start: of a round, with the learning rate of fine-tuning.
        """
        found: list[tuple[Sequence[int], Metrics]] = []
        for testing in self._spec.local:
            norms, program = None, Program("local", testing.tiers)
            remembers = testing.algorithm.personalise is not None
            if testing.has_common_norms:
                given = start.inputs.server.variables, self._calibration
                norms = compiled(Program("norms", testing.tiers))(*given)
            for chunk in self.calls[program]:
                # No more images, and rows of client memory, than of two calls.
                if (testing.streamed or remembers) and len(found) > 1:
                    jax.block_until_ready(found[-2][1])
                given = self._of_chunk(testing, chunk, start)
                found.append((chunk.clients, compiled(program)(*given, norms)))
        return found

    def arguments(self, start: RoundStart) -> Arguments:
        """The arguments of every program: those of its first tier or call, or like them."""
        found: dict[Program, tuple[Any, ...]] = {}
        variables = start.inputs.server.variables
        for tiers in self._spec.evaluated:
            found[Program("evaluate", tiers)] = self._of_tier(tiers[0], variables)
        for testing in self._spec.local:
            norms, program = None, Program("local", testing.tiers)
            if testing.has_common_norms:
                measurer = Program("norms", testing.tiers)
                found[measurer] = variables, self._calibration
                norms = programs(self._spec).shapes(measurer, *found[measurer])
            found[program] = *self._of_chunk(testing, self.calls[program][0], start), norms
        return found

    def _of_tier(self, tier: Tier, variables: Params) -> EvaluateArguments:
        setting = self._settings[tier.name]
        return EvaluateArguments(variables, setting, self._calibration, self._test)

    def _of_chunk(self, testing: LocalTesting, chunk: Chunk, start: RoundStart) -> tuple[Any, ...]:
        memory: Any = ()
        if testing.algorithm.personalise is not None:
            memory = self._rows.some(chunk.clients, len(chunk.tested.client), start.latest)
        images = self._images.send(chunk.needed, chunk.images)
        return start.inputs._replace(images=images), chunk.tested, memory
