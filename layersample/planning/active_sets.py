"""Which layers a run may train at once: the sets that hold most, and the one that a sampler typically draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from layersample.activations.chunked_loss import why_not_chunked
from layersample.choices import Granularity
from layersample.config import TrainConfig
from layersample.errors import some
from layersample.layers.costs import layer_costs
from layersample.layers.find import find_layers
from layersample.layers.rules import arrange
from layersample.planning.fake_models import fake_model
from layersample.planning.model_kinds import ModelKind
from layersample.registry import create_sampler
from layersample.sampling.answers import draw
from layersample.sampling.draw_size import find_draw_size
from layersample.sampling.sampler import LayerSampler, SamplingContext
from layersample.sampling.weighted import WeightedSampler

_DRAWS = 101
_UNMEASURED = "The sampler weighs layers by what it measures; the typical set is drawn uniformly."
_NEVER_DRAWN = "Layers whose chance is 0 aren't planned for: {}."


@dataclass(frozen=True)
class ActiveSets:
    """The layers of a model, their sizes, and the sets to plan for.

    Args:
        names: All that is sampled, from the input to the output: layers, groups, or parts of them.
        sizes: Parameters of each.
        always: Parameters that always train.
        outside: Parameters outside of the layers.
        largest_layer: Parameters of the largest layer.
        parameters: Number of parameters of the whole model.
        groups: Parameters of each group outside of the layers.
        can_checkpoint: Whether the model has gradient checkpointing.
        can_chunk: Whether its loss can be chunked.
        possible: Indices of those that may be drawn; all, but where a sampler gives some a chance of 0.
        worst: Sets, one of which holds most: the lowest layers that are drawn at all, whose backward is longest;
            these, but for one at the top; and the largest.
        typical: The median of many draws, by the depth of the lowest layer.
        notes: What had to be assumed.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    always: int
    outside: int
    largest_layer: int
    parameters: int
    groups: dict[str, int]
    can_checkpoint: bool
    can_chunk: bool
    possible: tuple[int, ...]
    worst: tuple[tuple[int, ...], ...]
    typical: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def num_layers(self) -> int:
        """How many layers there are to sample from."""
        return len(self.names)

    def trainable(self, active: Sequence[int]) -> int:
        """Parameters that train with a set of layers."""
        return self.always + sum(self.sizes[index] for index in active)

    def largest_trained(self, active: Sequence[int]) -> int:
        """Parameters of the largest unit that trains with a set of layers."""
        return max([self.always, *(self.sizes[index] for index in active)])


def find_active_sets(
    shape: PretrainedConfig, config: TrainConfig, *, kind: ModelKind | None = None
) -> ActiveSets:
    """Find the sets of layers to plan for.

    Args:
        shape: Configuration of the model.
        config: How it is trained.
        kind: How the model is built; found from its configuration by default.

    Raises:
        ConfigError: If the model is of a kind that isn't planned, there are fewer layers than ``num_active``, or no
            layers at all.
    """
    sampler = create_sampler(config.sampler, config.sampler_options)
    with fake_model(shape, config.precision, kind=kind) as model:
        layers = find_layers(model, config.layers)
        rules = {name: getattr(config, name) for name in layers.groups}
        units = arrange(
            model, layers, rules, granularity=config.granularity, train_towers=sampler.trains_everything
        )
        drawn = find_draw_size(
            model, units, sampler, num_active=config.num_active, draw_budget=config.draw_budget
        )
        size = {name: parameter.numel() for name, parameter in model.named_parameters()}
        costs = layer_costs(model, drawn.units)
        can_checkpoint = bool(getattr(model, "supports_gradient_checkpointing", False))
        can_chunk = why_not_chunked(model) is None
    sizes = tuple(sum(size[name] for name in unit.parameters) for unit in units.sampled)
    context = SamplingContext(
        layers=tuple(unit.name for unit in drawn.units.sampled),
        num_active=drawn.num_active,
        seed=config.run_seed,
        allow_empty=units.always_trains_something,
        costs=costs,
        budget=drawn.budget,
    )
    contexts = [replace(context, round=round, step=round * config.run_period) for round in range(_DRAWS)]
    draws, notes = _draw(sampler, contexts)
    possible = _possible(sampler, contexts)
    by_depth = sorted(draws, key=lambda active: (-min(active, default=len(sizes)), active))
    worst = _worst(
        replace(context, num_active=max(map(len, draws))),
        [sizes[place] for place in drawn.places],
        possible,
        config.granularity,
    )
    if never := [name for index, name in enumerate(context.layers) if index not in possible]:
        notes = (*notes, _NEVER_DRAWN.format(some(never)))

    def places(active: Sequence[int]) -> tuple[int, ...]:
        return tuple(drawn.places[index] for index in active)

    by_layer = [sum(size[name] for name in layer.parameters) for layer in layers.layers]
    return ActiveSets(
        names=tuple(unit.name for unit in units.sampled),
        sizes=sizes,
        always=sum(size[name] for group in units.always for name in group.parameters),
        outside=sum(size.values()) - sum(by_layer),
        largest_layer=max(by_layer),
        parameters=sum(size.values()),
        groups={name: sum(size[n] for n in group.parameters) for name, group in layers.groups.items()},
        can_checkpoint=can_checkpoint,
        can_chunk=can_chunk,
        possible=places(possible),
        worst=tuple(map(places, worst)),
        typical=places(by_depth[len(by_depth) // 2]),
        notes=(*notes, drawn.note) if drawn.note else notes,
    )


def _worst(
    context: SamplingContext, sizes: Sequence[int], possible: Sequence[int], granularity: Granularity
) -> tuple[tuple[int, ...], ...]:
    """Sets, one of which holds most.

    Args:
        context: The context of a draw that takes as many layers as the largest set has.
        sizes: Parameters of each layer.
        possible: Indices of the layers that may be drawn.
        granularity: Parts of layers differ in size more than layers do.
    """
    by_size = sorted(possible, key=lambda index: -sizes[index])
    lowest, largest = context.take(possible), context.take(by_size)
    # The top one trains while all that backward will need further down is still there.
    widest = context.take([*lowest[:-1], possible[-1]]) if len(lowest) > 1 else lowest
    sets = [lowest, largest, widest]
    if granularity != "layer" or context.budget is not None:
        # Backward goes all the way down, and what trains on the way is as large as can be.
        sets.append(context.take(sorted(by_size, key=lambda index: index != possible[0])))
    return tuple(dict.fromkeys(tuple(sorted(chosen)) for chosen in sets))


def _draw(
    sampler: LayerSampler, contexts: Sequence[SamplingContext]
) -> tuple[list[tuple[int, ...]], tuple[str, ...]]:
    if not sampler.has_measured:  # fake tensors can't be measured
        sized = [replace(c, num_active=sampler.num_drawn(c)) for c in contexts]
        uniform = [c.take(torch.randperm(c.num_layers, generator=c.generator).tolist()) for c in sized]
        return [tuple(sorted(drawn)) for drawn in uniform], (_UNMEASURED,)
    return [tuple(sorted(draw(sampler, context))) for context in contexts], ()


def _possible(sampler: LayerSampler, contexts: Sequence[SamplingContext]) -> Sequence[int]:
    """The layers that may be drawn: all, but for those to which weights that don't change give a chance of 0."""
    everything = range(contexts[0].num_layers)
    learns = sampler.measures or sampler.collects or type(sampler).observe is not LayerSampler.observe
    if learns or not isinstance(sampler, WeightedSampler):
        return everything
    chances = [0.0] * len(everything)
    for context in contexts:
        chances = [max(pair) for pair in zip(chances, sampler.probabilities(context), strict=True)]
        if all(chances):
            return everything
    return [index for index in everything if chances[index]]
