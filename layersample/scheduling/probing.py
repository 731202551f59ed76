"""The probe phase of a scheduler: what its sampler is told before anything trains."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from layersample.errors import ConfigError
from layersample.parallel.base import Engine
from layersample.sampling.sampler import LayerSampler, SamplingContext
from layersample.scheduling.gradient_probe import probe_gradients
from layersample.scheduling.reports import Reports

_OR_NONE = "or choose probe_batches=0, where the first periods tell the same."


class Probes(Reports):
    """The part of a scheduler that looks at the gradients of all layers before the first draw."""

    sampler: LayerSampler
    num_active: int
    seed: int
    _engine: Engine
    _model: nn.Module
    _batches: Callable[[], Iterable[Mapping[str, Any]]] | None

    @abstractmethod
    def _context(self, active: tuple[int, ...] = ()) -> SamplingContext:
        """What a sampler may look at."""

    def _probe(self, count: int) -> None:
        """Fill the statistics of gradients, and have the sampler observe them.

        As many layers are looked at a time as train at a time, so that it fits where training does.

        Args:
            count: Most calibration batches.

        Raises:
            ConfigError: If there are no batches, weights are held rounded, or several processes train.
        """
        self._engine.check_probe()
        if self._switch.frozen is not None:
            raise ConfigError(
                "A probe of gradients needs exact weights on the device, but frozen_weights holds them rounded: leave "
                f"frozen_weights out, {_OR_NONE}"
            )
        if self._batches is None:
            raise ConfigError(
                "A probe of gradients needs calibration batches, but got none: give batches= to the scheduler, "
                f"{_OR_NONE}"
            )
        parameters = dict(self._model.named_parameters())
        layers = [
            [parameters[name] for name in unit.parameters if self._units.trainable[name]]
            for unit in self._units.sampled
        ]
        told = probe_gradients(
            self._model,
            layers,
            self._batches,
            count=count,
            at_once=self.num_active,
            seed=self.seed,
            prepare=self._switch.prepare_checkpointing,
        )
        assert self._history.gradients is not None  # whoever probes collects them
        for norms in told:
            self._history.gradients.add(norms)
        context = self._context(tuple(range(len(self.layers))))
        self.sampler.observe(self.statistics, replace(context, probing=True))
        self._history.end_period()
