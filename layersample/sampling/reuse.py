"""Samplers that have learned in one run, and are given to another one as they are."""

from __future__ import annotations

import logging
from weakref import WeakSet

from layersample.sampling.sampler import LayerSampler, SamplingContext
from layersample.sampling.statistics import LayerStatistics

logger = logging.getLogger(__name__)

_LEARNED: WeakSet[LayerSampler] = WeakSet()


def observe(sampler: LayerSampler, statistics: LayerStatistics, context: SamplingContext) -> None:
    """Let a sampler observe a period, and note whether it has learned from one."""
    if sampler in _LEARNED:
        sampler.observe(statistics, context)
        return
    before = repr(sampler.state_dict())  # a copy: it may give what it goes on to change
    sampler.observe(statistics, context)
    if repr(sampler.state_dict()) != before:
        _LEARNED.add(sampler)


def warn_of_learned(sampler: LayerSampler) -> None:
    """Say where a run that is new begins with what a sampler has learned in another one.

    What it has measured may be given on, see FSDP2; so this is said and not refused.
    """
    if sampler in _LEARNED:
        logger.warning(
            "This %s has learned from the periods of another run, and begins this one with what it knows: give its "
            "name or a new one (create_sampler) to begin without, or state_dict= to continue that run.",
            type(sampler).__name__,
        )


def forget(sampler: LayerSampler) -> None:
    """A sampler has been given its first state back."""
    _LEARNED.discard(sampler)
