"""Groups of neighbouring layers, one after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from layersample import LayerSampler, SamplingContext, register

Order = Literal["ascending", "descending", "mirror", "reshuffled"]


@register("cyclic")
@dataclass(kw_only=True, eq=False)
class Cyclic(LayerSampler):
    """Train groups of ``num_active`` neighbouring layers in turn, each once an epoch (BAdam, HiFT).

    The last group is smaller where ``num_active`` doesn't divide the number of layers. Under a ``draw_budget`` a group
    is as large as it has room for.

    Args:
        order: Order of the groups: ``"ascending"`` from the input to the output, ``"descending"`` the other
            way, ``"mirror"`` up and down in turn (the turning groups come twice), ``"reshuffled"`` a new
            random order in each epoch.

    References:
        BAdam (arXiv 2404.02827): block coordinate descent, reshuffled or in order. HiFT (arXiv 2401.15207):
        bottom-up, top-down and random groups of m layers.
    """

    keeps_budget = True
    source = "BAdam, arXiv 2404.02827; HiFT, arXiv 2401.15207"

    order: Order = "ascending"

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}, but got {self.order!r}.")

    def inclusion_probabilities(self, context: SamplingContext) -> list[float]:
        """1 for the group whose turn it is; equal for all where the order is random."""
        groups = _groups(context)
        if self.order == "reshuffled":
            reached = {index for group in groups for index in group}
            return [float(index in reached) / len(groups) for index in range(context.num_layers)]
        group = self.sample(context)
        return [float(index in group) for index in range(context.num_layers)]

    def sample(self, context: SamplingContext) -> list[int]:
        """Return the group of this period."""
        groups = _groups(context)
        epoch, place = divmod(context.round, len(groups))
        if self.order == "reshuffled":
            # One order for the whole epoch: the randomness of the epoch's first period.
            generator = context.generator_at(epoch * len(groups))
            place = int(torch.randperm(len(groups), generator=generator)[place])
        elif self.order == "descending" or (self.order == "mirror" and epoch % 2):
            place = len(groups) - 1 - place
        return groups[place]


def _groups(context: SamplingContext) -> list[list[int]]:
    """The groups from the input to the output; under a budget without what doesn't fit even alone."""
    count, budget = context.num_active, context.budget
    if budget is None:
        layers = list(range(context.num_layers))
        return [layers[first : first + count] for first in range(0, context.num_layers, count)]
    groups: list[list[int]] = [[]]
    for index in (i for i, size in enumerate(budget.sizes) if size <= budget.limit):
        if budget.total([*groups[-1], index]) > budget.limit:
            groups.append([])
        groups[-1].append(index)
    return groups
