"""How much a draw may hold: a number of layers, or a budget of bytes or parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from layersample.amounts import read_amount
from layersample.errors import ConfigError, some
from layersample.layers.find import Layer
from layersample.layers.rules import Units
from layersample.sampling.draw_budget import DrawBudget
from layersample.sampling.sampler import LayerSampler


@dataclass(frozen=True)
class DrawSize:
    """What is drawn from, and how much of it at a time.

    Args:
        units: What is sampled; under a budget, without what it never has room for.
        num_active: Layers of a draw; under a budget, the most that it has room for.
        budget: The budget, if there is one.
        places: Indices of these units among all that could be sampled.
        note: What the user should know of it; empty if nothing.
    """

    units: Units
    num_active: int
    budget: DrawBudget | None
    places: tuple[int, ...]
    note: str = ""


def find_draw_size(
    model: nn.Module,
    units: Units,
    sampler: LayerSampler,
    *,
    num_active: int,
    draw_budget: str | float | None,
) -> DrawSize:
    """What is drawn from, and how much of it at a time.

    Args:
        model: The model.
        units: What is sampled of it.
        sampler: What samples.
        num_active: Layers that the user asks for; without effect where there is a budget.
        draw_budget: Bytes of weights, such as ``"500MB"``; a part of all parameters, such as ``"3%"``; or none.

    Raises:
        ConfigError: If there are fewer layers; if the budget can't be read, doesn't suffice for the smallest unit, or
            isn't kept by the sampler.
    """
    if draw_budget is None:
        if num_active > len(units.sampled):
            raise ConfigError(
                f"num_active must be between 1 and the {len(units.sampled)} layers to sample from, "
                f"but got num_active={num_active}."
            )
        return DrawSize(units, num_active, None, tuple(range(len(units.sampled))))
    if not sampler.keeps_budget:
        raise ConfigError(
            f"draw_budget needs a sampler that keeps to it, but {type(sampler).__name__} with its options doesn't say "
            "that it does (keeps_budget): leave draw_budget out, and give num_active."
        )
    whole = _make_budget(model, units, draw_budget)
    _check_smallest(units.sampled, whole, draw_budget)
    inside = [index for index, size in enumerate(whole.sizes) if size <= whole.limit]
    budget = whole.among(inside)
    reached = replace(units, sampled=tuple(units.sampled[index] for index in inside))
    return DrawSize(reached, budget.most, budget, tuple(inside), _describe_rest(units.sampled, whole))


def _make_budget(model: nn.Module, units: Units, draw_budget: str | float) -> DrawBudget:
    amount = read_amount(draw_budget, "draw_budget")
    parameters = dict(model.named_parameters())
    own = [[parameters[name] for name in names] for names in units.trained_of_each]
    if isinstance(amount, int):
        sizes = tuple(sum(p.numel() * p.element_size() for p in unit) for unit in own)
        return DrawBudget(sizes, amount, "bytes")
    sizes = tuple(sum(p.numel() for p in unit) for unit in own)
    return DrawBudget(sizes, int(amount * sum(p.numel() for p in parameters.values())), "parameters")


def _check_smallest(sampled: Sequence[Layer], budget: DrawBudget, draw_budget: str | float) -> None:
    smallest = min(range(len(sampled)), key=lambda index: budget.sizes[index])
    if budget.sizes[smallest] > budget.limit:
        raise ConfigError(
            f"draw_budget must suffice for the smallest unit, {sampled[smallest].name}, of "
            f"{budget.sizes[smallest]:,} {budget.unit}, but draw_budget={str(draw_budget)!r} is {budget.limit:,}: "
            "raise it, or choose a finer granularity."
        )


def _describe_rest(sampled: Sequence[Layer], budget: DrawBudget) -> str:
    rest = [
        f"{unit.name} ({size:,} {budget.unit})"
        for unit, size in zip(sampled, budget.sizes, strict=True)
        if size > budget.limit
    ]
    if not rest:
        return ""
    return (
        f"draw_budget has no room for {len(rest)} of the {len(sampled)} units, which never train: {some(rest)}; it is "
        f"{budget.limit:,}."
    )
