"""Find the layers of a model that a sampler may choose from, and sort every other parameter into a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from layersample.errors import ConfigError, some
from layersample.layers.groups import GROUPS, Grouping, GroupName
from layersample.layers.modules import is_inside
from layersample.layers.stacks import find_stacks, list_paths, name_layers, repeats_one_layer


@dataclass(frozen=True)
class Layer:
    """A named set of parameters that is frozen and trained as one: a layer, a part of one, or a group.

    Args:
        name: Path of the module, or the name of the group.
        parameters: Names of its parameters, as in ``model.named_parameters()``. Names rather than tensors,
            because FSDP and ``accelerator.prepare`` replace parameter objects.
        within: Name of the layer that it is a part of; ``None`` for a whole one.
    """

    name: str
    parameters: tuple[str, ...]
    within: str | None = None

    @property
    def layer(self) -> str:
        """Name of the layer that it is, or is a part of."""
        return self.within or self.name


@dataclass(frozen=True)
class ModelLayers:
    """Every parameter of a model, once.

    Args:
        layers: The layers to sample from, from the input to the output; at least one.
        groups: The parameters outside of the layers: ``"embeddings"``, ``"head"``, ``"norm"`` (the final
            one) and ``"other"``. A tied head is part of the embeddings.
        frozen: Parameters of the towers beside a language model (vision, audio): they train only where all of the
            model does.
        tied_head: Whether the head shares the embedding's weight.
        towers: Paths of the modules that :attr:`frozen` is of.
    """

    layers: tuple[Layer, ...]
    groups: dict[GroupName, Layer]
    frozen: tuple[str, ...]
    tied_head: bool
    towers: tuple[str, ...] = ()


_SHARED = (
    "Each layer must have parameters of its own, but {model} runs one layer many times or shares one set of "
    "weights between its layers: there is nothing to sample."
)


def find_layers(model: nn.Module, layers: str | Sequence[str | nn.Module] | None = None) -> ModelLayers:
    """Find the layers of a model: those of its language model, or those that the caller names.

    For a transformers model it takes the outermost ``ModuleList`` or ``ModuleDict`` whose children are all
    ``GradientCheckpointingLayer`` or classes in ``model._no_split_modules``; failing that, one of
    ``config.num_hidden_layers`` modules of one class. Of a multimodal model that generates text the language model's
    stack is taken and the other towers are frozen; of two encoders that are compared (CLIP) both stacks; of an
    encoder-decoder both, encoder first. A plain module is searched for the transformers models that it wraps.

    Args:
        model: Any transformers model, or any module when ``layers`` is given.
        layers: Path of a ``ModuleList``, ``Sequential`` or ``ModuleDict`` whose children are the layers
            (``"transformer.h"``), or the layers themselves, each as a path or a submodule of ``model``.

    Raises:
        ConfigError: If no layers are found, a path doesn't exist, or the layers share their weights.
    """
    modules = dict(model.named_modules())
    if layers is None:
        stacks, towers = find_stacks(modules)
    else:
        stacks, towers = [name_layers(modules, layers)], []
    paths = [path for stack in stacks for path in stack]
    if not paths and repeats_one_layer(model, modules):
        raise ConfigError(_SHARED.format(model=type(model).__name__))
    if not paths:
        raise ConfigError(
            f"No layers found in {type(model).__name__}: it has no ModuleList of transformer blocks. Name them with "
            f"layers=: the path of a ModuleList, or a list of paths. It has: {some(map(repr, list_paths(modules)))}."
        )
    return _sort_parameters(model, modules, paths, towers)


def _sort_parameters(
    model: nn.Module, modules: dict[str, nn.Module], paths: list[str], towers: list[str]
) -> ModelLayers:
    shared = _shared_parameters(modules, paths)
    by_layer: dict[str, list[str]] = {path: [] for path in paths}
    by_group: dict[GroupName, list[str]] = {group: [] for group in GROUPS}
    frozen: list[str] = []
    group_of = Grouping(model, modules, paths)
    names = _all_names(model)
    tied_head = False
    for name, parameter in model.named_parameters():  # a tied weight comes once, under its first name
        layer = next((path for path in paths if is_inside(name, path)), None)
        if any(is_inside(name, tower) for tower in towers):
            frozen.append(name)
        elif layer is not None and id(parameter) not in shared:
            by_layer[layer].append(name)
        elif layer is not None:
            by_group["other"].append(name)
        else:
            groups = {group_of(other) for other in names[id(parameter)]}
            tied_head = tied_head or {"embeddings", "head"} <= groups
            by_group[min(groups, key=GROUPS.index)].append(name)
    if not all(by_layer.values()):
        raise ConfigError(_SHARED.format(model=type(model).__name__))
    return ModelLayers(
        layers=tuple(Layer(path, tuple(names)) for path, names in by_layer.items()),
        groups={group: Layer(group, tuple(names)) for group, names in by_group.items()},
        frozen=tuple(frozen),
        tied_head=tied_head,
        towers=tuple(towers),
    )


def _all_names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its id: a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _shared_parameters(modules: dict[str, nn.Module], paths: list[str]) -> set[int]:
    """Ids of the parameters that two or more layers hold."""
    seen: set[int] = set()
    shared: set[int] = set()
    for path in paths:
        own = {id(parameter) for parameter in modules[path].parameters()}
        shared |= own & seen
        seen |= own
    return shared
