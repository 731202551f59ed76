"""What is sampled, what always trains, and what never does; and whether an optimizer can train it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from layersample.choices import Granularity, Rule
from layersample.errors import ConfigError, some
from layersample.layers.find import Layer, ModelLayers
from layersample.layers.groups import GroupName
from layersample.layers.modules import is_inside
from layersample.layers.units import split_group, split_layers
from layersample.notices import warn_once

logger = logging.getLogger(__name__)

_STRICTNESS: tuple[Rule, ...] = ("train", "sample", "freeze")


@dataclass(frozen=True)
class Units:
    """The layers and groups of a model, by what happens to them.

    Args:
        sampled: What a sampler picks from, from the input to the output: layers and groups, or parts of them.
        always: The groups that train in every period.
        trainable: For each parameter by name, whether it required a gradient before sampling began; one that
            didn't stays frozen.
    """

    sampled: tuple[Layer, ...]
    always: tuple[Layer, ...]
    trainable: dict[str, bool]

    def training(self, active: Iterable[int]) -> dict[str, tuple[str, ...]]:
        """Parameters that train while some of :attr:`sampled` are active, by the name of their layer or group."""
        units = [*(self.sampled[index] for index in active), *self.always]
        return {unit.name: tuple(n for n in unit.parameters if self.trainable[n]) for unit in units}

    def parts_of(self, layers: ModelLayers) -> ModelLayers:
        """A model's layers with those of :attr:`sampled` in their place that are layers, or parts of them."""
        names = {layer.name for layer in layers.layers}
        return replace(layers, layers=tuple(unit for unit in self.sampled if unit.layer in names))

    def layers_of(self, active: Iterable[int], layers: ModelLayers) -> list[str]:
        """Names of those of a model's layers that some of :attr:`sampled` are, or are parts of, in their order."""
        names = {layer.name for layer in layers.layers}
        found = dict.fromkeys(self.sampled[index].layer for index in active)
        return [name for name in found if name in names]

    @property
    def trained_of_each(self) -> list[tuple[str, ...]]:
        """Parameters that train of each of :attr:`sampled`, while it is active."""
        return [tuple(n for n in unit.parameters if self.trainable[n]) for unit in self.sampled]

    @property
    def always_trains_something(self) -> bool:
        """Whether a period without any layer still trains something."""
        return any(self.training(()).values())


def arrange(
    model: nn.Module,
    layers: ModelLayers,
    rules: Mapping[GroupName, Rule],
    *,
    granularity: Granularity = "layer",
    train_towers: bool = False,
) -> Units:
    """Sort a model's layers and groups by the rules for its groups, and cut what is sampled into units.

    Args:
        model: The model, as it is before sampling.
        layers: Its layers.
        rules: The rule of each group. A tied head is the embedding: the stricter rule of the two holds.
        granularity: What is sampled as one: see :func:`~layersample.layers.units.split_layers`. A part of a layer
            without a parameter that may train is left out.
        train_towers: Whether the towers that are otherwise frozen train in every period.

    Raises:
        ConfigError: If a rule is unknown, or holds for nothing although there may be something that it is meant for;
            or if a layer to be sampled has no trainable parameter, or can't be cut.
    """
    for group, rule in rules.items():
        if rule not in _STRICTNESS:
            raise ConfigError(f"{group} must be 'train', 'freeze' or 'sample', but got {rule!r}.")
    rules = dict(rules)
    _check_that_rules_hold(layers, rules)
    if layers.tied_head:
        rules["embeddings"] = max(rules["embeddings"], rules["head"], key=_STRICTNESS.index)

    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def sampled(*names: GroupName) -> list[Layer]:
        return [
            layers.groups[name]
            for name in names
            if rules[name] == "sample" and layers.groups[name].parameters
        ]

    below, above = sampled("embeddings", "other"), sampled("norm", "head")
    _check_trainable((*below, *layers.layers, *above), trainable)
    units = (
        *(unit for group in below for unit in split_group(group, granularity)),
        *split_layers(model, layers, granularity),
        *(unit for group in above for unit in split_group(group, granularity)),
    )
    return Units(
        sampled=tuple(unit for unit in units if any(trainable[name] for name in unit.parameters)),
        always=(
            *(group for name, group in layers.groups.items() if rules[name] == "train"),
            *([Layer("towers", layers.frozen)] if train_towers and layers.frozen else []),
        ),
        trainable=trainable,
    )


def _check_trainable(sampled: Iterable[Layer], trainable: Mapping[str, bool]) -> None:
    frozen = [unit.name for unit in sampled if not any(trainable[n] for n in unit.parameters)]
    if frozen:
        raise ConfigError(
            f"Every sampled layer must have a parameter with requires_grad=True when the scheduler is made, "
            f"but {some(frozen)} has none. Unfreeze them before you build the optimizer, leave them out with "
            f"layers=, or close() the scheduler that froze them."
        )


def _check_that_rules_hold(layers: ModelLayers, rules: Mapping[GroupName, Rule]) -> None:
    """Refuse a rule for a group that wasn't found, where what it is meant for may be among the others."""
    other = layers.groups["other"].parameters
    for group in ("embeddings", "head", "norm"):
        is_there = layers.groups[group].parameters or (group == "head" and layers.tied_head)
        if is_there or rules[group] == "train" or rules[group] == rules["other"] or not other:
            continue
        raise ConfigError(
            f"{group}={rules[group]!r} must hold for something, but no parameter was found that belongs to the "
            f"{group}. Outside of the layers there are also {some(other)}: name the rule for them by other=, or leave "
            f"{group}= out."
        )


def warn_of_towers(model: nn.Module, layers: ModelLayers, units: Units) -> None:
    """Say once which parameters, that the user left trainable, are frozen for good."""
    own = {name for names in units.training(range(len(units.sampled))).values() for name in names}
    sizes = {name: p.numel() for name, p in model.named_parameters() if units.trainable[name]}
    frozen = {
        tower: sum(sizes.get(name, 0) for name in layers.frozen if is_inside(name, tower) and name not in own)
        for tower in layers.towers
    }
    listed = [f"{tower} ({count:,} parameters)" for tower, count in frozen.items() if count]
    if listed:
        warn_once(
            logger,
            model,
            "Layers are sampled from the language model alone, and what stands beside it stays frozen: %s. To train "
            "it too, choose a sampler that trains everything, or name the layers with layers=.",
            ", ".join(listed),
        )


def warn_of_shared(model: nn.Module, layers: ModelLayers, units: Units) -> None:
    """Say once which parameters belong to no layer, because several layers share them, and what becomes of them."""
    holders: dict[int, set[str]] = {}
    paths = {layer.name for layer in layers.layers}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = next((part for part in _ancestors(name) if part in paths), None)
        if path is not None:
            holders.setdefault(id(parameter), set()).add(path)
    parameters = dict(model.named_parameters())
    shared = [
        name
        for name in layers.groups["other"].parameters
        if units.trainable[name] and len(holders.get(id(parameters[name]), ())) > 1
    ]
    if shared:
        always = {name for names in units.training(()).values() for name in names}
        warn_once(
            logger,
            model,
            "%s is shared by several layers, so that it is no layer's own: the rule other= holds for it, by which it "
            "%s.",
            some(shared),
            "trains in every period"
            if always.issuperset(shared)
            else "is sampled by itself, or stays frozen",
        )


def _ancestors(name: str) -> Iterable[str]:
    """The paths of the modules that a parameter lies in, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def check_optimizer(model: nn.Module, groups: Iterable[Mapping[str, Any]], units: Units) -> None:
    """Make sure that a model's optimizers hold every parameter that may train, and each is held by one of them.

    Args:
        model: The model.
        groups: The ``param_groups`` of all optimizers.
        units: What may train.

    Raises:
        ConfigError: If they lack some, or hold some twice; it names them.
    """
    parameters = dict(model.named_parameters())
    held = Counter(id(parameter) for group in groups for parameter in group["params"])
    names = [name for own in units.training(range(len(units.sampled))).values() for name in own]
    lacking = [name for name in names if id(parameters[name]) not in held]
    if len(lacking) == len(names):
        raise ConfigError("The optimizer must hold this model's parameters, but holds none of them.")
    if lacking:
        raise ConfigError(
            f"The optimizer must hold every parameter that may train, but it lacks {some(lacking)}, which "
            f"would never train. Build it while all of them require a gradient."
        )
    twice = [name for name, parameter in parameters.items() if held[id(parameter)] > 1]
    if twice:
        raise ConfigError(
            f"Each parameter must be in one group of one optimizer, but {some(twice)} is in several and would be "
            "stepped by each of them."
        )
