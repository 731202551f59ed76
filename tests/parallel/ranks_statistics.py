"""A sampler that keeps what it is told, for the checks of two ranks against one."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist
from torch import nn

from layersample import ConfigError, LayerSampler, LayerScheduler, LayerStatistics, SamplingContext
from tests.helpers import make_batch, make_llama
from tests.parallel.ranks import NUM_LAYERS


class Keeps(LayerSampler):
    """Neighbouring layers in turn."""

    collects = frozenset({"gradients", "loss", "weights"})

    def __init__(self) -> None:
        self.norms: list[tuple[float | None, ...]] = []
        self.losses: list[float | None] = []
        self.changes: list[tuple[float | None, ...]] = []

    def sample(self, context: SamplingContext) -> list[int]:
        first = 2 * context.round % context.num_layers
        return [first, first + 1]

    def observe(self, statistics: LayerStatistics, context: SamplingContext) -> None:
        self.norms.append(statistics.gradient_norm)
        self.losses.append(statistics.loss.last)
        self.changes.append(statistics.weight_change)


class Disagrees(Keeps):
    """Ends a period early on one rank alone."""

    watches_steps = True

    def wants_new_period(self, statistics: LayerStatistics, context: SamplingContext) -> bool:
        return dist.get_rank() == 0


def train_watched(model: nn.Module, *, part: slice = slice(None), sampler: Keeps | None = None) -> Keeps:
    """Four steps in two periods on this rank's part of each batch, with gradients that are clipped to nearly nothing."""
    sampler = sampler or Keeps()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with LayerScheduler(model, optimizer, sampler, num_active=2, period=2) as scheduler:
        for step in range(4):
            batch = {key: value[part] for key, value in make_batch(step, size=4).items()}
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            scheduler.step(loss=loss)
            optimizer.zero_grad()
    return sampler


def compare_statistics(model: nn.Module) -> None:
    """What each rank is told is what one process is told of the whole batches, and the same to the bit on all.

    Ranks that don't agree whether a period ends say so, in place of waiting for each other.
    """
    rank = dist.get_rank()
    own = train_watched(model, part=slice(2 * rank, 2 * rank + 2))
    one = train_watched(make_llama(NUM_LAYERS, dtype=torch.float64))
    assert len(own.norms) == len(own.losses) == 2
    for told, expected in zip([*own.norms, *own.changes], [*one.norms, *one.changes], strict=True):
        assert [norm or 0.0 for norm in told] == pytest.approx([norm or 0.0 for norm in expected], rel=1e-9)
        assert sum(norm is not None for norm in told) in (2, 4)
    assert own.losses == pytest.approx(one.losses, rel=1e-6)  # in fp32
    told_everywhere: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(told_everywhere, (own.norms, own.losses, own.changes))
    assert told_everywhere[0] == told_everywhere[1]
    with pytest.raises(ConfigError, match="agree whether period 0 ends at step 1, but ranks 0 say yes"):
        train_watched(model, sampler=Disagrees())
