"""Find the layers of a model that a sampler may choose from, and sort every other parameter into a group."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from layersample.errors import some

logger = logging.getLogger(__name__)

GroupName = Literal["embeddings", "head", "norm", "other"]
GROUPS: tuple[GroupName, ...] = get_args(GroupName)


@dataclass(frozen=True)
class Layer:
    """A named set of parameters that is frozen and trained as one.

    Args:
        name: Path of the module, or the name of the group.
        parameters: Names of its parameters, as in ``model.named_parameters()``, in that order. Names
            rather than tensors, because FSDP and ``accelerator.prepare`` replace parameter objects.
    """

    name: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class ModelLayers:
    """Every parameter of a model, once.

    Args:
        layers: The layers to sample from, from the input to the output; at least one.
        groups: The parameters outside of the layers: ``"embeddings"``, ``"head"``, ``"norm"`` (the final
            one) and ``"other"``. A tied head is part of the embeddings.
        frozen: Parameters that never train: the vision or audio tower of a multimodal model.
        tied_head: Whether the head shares the embedding's weight.
        num_stacks: How many separate stacks the layers come from: 2 for an encoder with a decoder.
    """

    layers: tuple[Layer, ...]
    groups: dict[GroupName, Layer]
    frozen: tuple[str, ...]
    tied_head: bool
    num_stacks: int


_SHARED = (
    "Each layer must have parameters of its own, but {model} runs one layer many times or shares one set of "
    "weights between its layers: there is nothing to sample."
)


def find_layers(model: nn.Module, layers: str | Sequence[str | nn.Module] | None = None) -> ModelLayers:
    """Find the layers of a model: those of its language model, or those that the caller names.

    For a transformers model it takes the outermost ``ModuleList`` whose children are all
    ``GradientCheckpointingLayer`` or classes in ``model._no_split_modules``; failing that, one of
    ``config.num_hidden_layers`` modules of one class. Of a multimodal model the language model's stack is
    taken and the other towers are frozen; of an encoder-decoder both stacks, encoder first.

    Args:
        model: Any transformers model, or any module when ``layers`` is given.
        layers: Path of a ``ModuleList`` or ``Sequential`` whose children are the layers
            (``"transformer.h"``), or the layers themselves, each as a path or a submodule of ``model``.

    Raises:
        ValueError: If no layers are found, a path doesn't exist, or the layers share their weights.
    """
    modules = dict(model.named_modules())
    if layers is None:
        stacks, towers = _find_stacks(model, modules)
    else:
        stacks, towers = [_named_layers(modules, layers)], []
    paths = [path for stack in stacks for path in stack]
    if not paths and _repeats_one_layer(model, modules):
        raise ValueError(_SHARED.format(model=type(model).__name__))
    if not paths:
        raise ValueError(
            f"No layers found in {type(model).__name__}: it has no ModuleList of transformer blocks. Name them with "
            f"layers=: the path of a ModuleList, or a list of paths. It has: {some(map(repr, _list_paths(modules)))}."
        )
    return _sort_parameters(model, modules, paths, towers, num_stacks=len(stacks))


def _sort_parameters(
    model: nn.Module, modules: dict[str, nn.Module], paths: list[str], towers: list[str], num_stacks: int
) -> ModelLayers:
    shared = _shared_parameters(modules, paths)
    by_layer: dict[str, list[str]] = {path: [] for path in paths}
    by_group: dict[GroupName, list[str]] = {group: [] for group in GROUPS}
    frozen: list[str] = []
    group_of = _Grouping(model, modules, paths)
    for name, parameter in model.named_parameters():  # a tied weight comes once, under its first name
        layer = next((path for path in paths if _inside(name, path)), None)
        if any(_inside(name, tower) for tower in towers):
            frozen.append(name)
        elif layer is not None and id(parameter) not in shared:
            by_layer[layer].append(name)
        else:
            by_group["other" if layer is not None else group_of(name)].append(name)
    if not all(by_layer.values()):
        raise ValueError(_SHARED.format(model=type(model).__name__))
    return ModelLayers(
        layers=tuple(Layer(path, tuple(names)) for path, names in by_layer.items()),
        groups={group: Layer(group, tuple(names)) for group, names in by_group.items()},
        frozen=tuple(frozen),
        tied_head=group_of.tied_head,
        num_stacks=num_stacks,
    )


class _Grouping:
    """Tells the group of a parameter outside of the layers, by what its modules are, not by model class."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], paths: list[str]) -> None:
        self._modules = modules
        embedding, head = _call(model, "get_input_embeddings"), _call(model, "get_output_embeddings")
        self._embedding = next((p for p, m in modules.items() if m is embedding), None)
        self._head = next((p for p, m in modules.items() if m is head), None)
        self.tied_head = embedding is not None and head is not None and _share_weight(embedding, head)
        prefix = getattr(model, "base_model_prefix", "")
        self._base = prefix if prefix in modules and prefix else None
        # A plain module says nothing of its head: what is registered behind the last layer counts as one.
        names = [name for name, _ in model.named_parameters()]
        last = max((i for i, name in enumerate(names) if any(_inside(name, p) for p in paths)), default=-1)
        self._behind = set() if hasattr(model, "config") else set(names[last + 1 :])

    def __call__(self, name: str) -> GroupName:
        path, _, _ = name.rpartition(".")
        module = self._modules[path]
        if self._embedding and _inside(name, self._embedding):
            return "embeddings"
        if self._head and _inside(name, self._head):
            return "head"
        if isinstance(module, nn.Embedding) or any("embed" in part for part in name.split(".")):
            return "embeddings"
        if self._base and not _inside(name, self._base):
            return "head"
        if "norm" in type(module).__name__.lower():
            return "norm"
        return "head" if name in self._behind else "other"


def _find_stacks(model: nn.Module, modules: dict[str, nn.Module]) -> tuple[list[list[str]], list[str]]:
    """Return the stacks as lists of paths, and the paths of the towers to freeze."""
    config = getattr(model, "config", None)
    depth = getattr(_text_config(config), "num_hidden_layers", None)
    stacks = _outermost(modules, lambda blocks: all(_is_block(model, block) for block in blocks))
    if not stacks:
        stacks = _outermost(modules, lambda blocks: len(blocks) == depth and len(set(map(type, blocks))) == 1)
    if len(stacks) < 2 or getattr(config, "is_encoder_decoder", False):
        return [_children(modules, stack) for stack in stacks], []
    is_multimodal = _text_config(config) is not config
    chosen = _language_stacks(model, modules, stacks) if is_multimodal else stacks
    # What is left over may be a stack of convolutions in front of the layers (wav2vec2).
    chosen = [stack for stack in chosen if len(modules[stack]) == depth] or chosen  # type: ignore[arg-type]
    towers = [_tower(stack, chosen) for stack in stacks if stack not in chosen] if is_multimodal else []
    return [_children(modules, stack) for stack in chosen], towers


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # more than one text model
        return config


def _outermost(modules: dict[str, nn.Module], accepts: Callable[[list[nn.Module]], bool]) -> list[str]:
    """Paths of the ModuleLists of two or more accepted modules that don't lie in one another."""
    found: list[str] = []
    for path, module in modules.items():  # parents come before their children
        if isinstance(module, nn.ModuleList) and len(module) > 1 and accepts(list(module)):
            if not any(_inside(path, outer) for outer in found):
                found.append(path)
    return found


def _repeats_one_layer(model: nn.Module, modules: dict[str, nn.Module]) -> bool:
    depth = getattr(_text_config(getattr(model, "config", None)), "num_hidden_layers", None) or 0
    lengths = {len(module) for module in modules.values() if isinstance(module, nn.ModuleList)}
    return depth > 1 and lengths == {1}


def _is_block(model: nn.Module, block: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    names = getattr(model, "_no_split_modules", None) or ()
    return isinstance(block, GradientCheckpointingLayer) or type(block).__name__ in names


def _language_stacks(model: nn.Module, modules: dict[str, nn.Module], stacks: list[str]) -> list[str]:
    """The stacks inside of a multimodal model's language model; all of them where it can't be told."""
    decoder = _call(model, "get_decoder")
    root = next((path for path, module in modules.items() if module is decoder and module is not model), None)
    inside = [stack for stack in stacks if root and _inside(stack, root)]
    return inside or [stack for stack in stacks if "text" in stack or "language" in stack] or stacks


def _tower(stack: str, language: list[str]) -> str:
    """The widest module around ``stack`` that holds no language layers."""
    parts = stack.split(".")
    for length in range(1, len(parts) + 1):
        path = ".".join(parts[:length])
        if not any(_inside(other, path) for other in language):
            return path
    return stack


def _named_layers(modules: dict[str, nn.Module], layers: str | Sequence[str | nn.Module]) -> list[str]:
    if isinstance(layers, str):
        if not isinstance(modules.get(layers), nn.ModuleList | nn.Sequential):
            raise ValueError(
                f"layers={layers!r} must be the path of a ModuleList or Sequential. "
                f"The model has: {some(map(repr, _list_paths(modules)))}."
            )
        return _children(modules, layers)
    path_of = {id(module): path for path, module in modules.items()}
    paths = [layer if isinstance(layer, str) else path_of.get(id(layer), "") for layer in layers]
    for layer, path in zip(layers, paths, strict=True):
        if path not in modules or not path:
            what = repr(layer) if isinstance(layer, str) else type(layer).__name__
            raise ValueError(f"Each of layers= must be a submodule of the model or its path, but got {what}.")
    for i, path in enumerate(paths):
        if any(_inside(path, other) for other in paths[:i] + paths[i + 1 :]):
            raise ValueError(f"layers= must not repeat or contain one another, but {path!r} does.")
    return paths


def _children(modules: dict[str, nn.Module], stack: str) -> list[str]:
    return [f"{stack}.{name}" if stack else name for name, _ in modules[stack].named_children()]


def _list_paths(modules: dict[str, nn.Module]) -> list[str]:
    return [path for path, module in modules.items() if isinstance(module, nn.ModuleList | nn.Sequential)]


def _shared_parameters(modules: dict[str, nn.Module], paths: list[str]) -> set[int]:
    """Ids of the parameters that two or more layers hold."""
    seen: set[int] = set()
    shared: set[int] = set()
    for path in paths:
        own = {id(parameter) for parameter in modules[path].parameters()}
        shared |= own & seen
        seen |= own
    return shared


def _share_weight(first: nn.Module, second: nn.Module) -> bool:
    own = {id(parameter) for parameter in first.parameters()}
    return any(id(parameter) in own for parameter in second.parameters())


def _call(model: nn.Module, method: str) -> nn.Module | None:
    """The module that an accessor of transformers returns; some raise for models that have none."""
    accessor = getattr(model, method, None)
    if accessor is None or not inspect.ismethod(accessor):
        return None
    try:
        module = accessor()
    except (NotImplementedError, AttributeError, TypeError):
        return None
    return module if isinstance(module, nn.Module) else None


def _inside(name: str, path: str) -> bool:
    return path == "" or name == path or name.startswith(path + ".")
