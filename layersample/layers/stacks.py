"""Where the layers of a model are: its stacks of transformer blocks, and the towers that stay frozen beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from layersample.errors import ConfigError, some
from layersample.layers.modules import (
    accessor,
    children,
    is_inside,
    join,
    repeated_blocks,
    transformers_models,
)

Modules = Mapping[str, nn.Module]


def find_stacks(modules: Modules) -> tuple[list[list[str]], list[str]]:
    """Find the layers of each stack, as paths, and the paths of the towers to freeze.

    A module that wraps transformers models has the stacks of all of them.
    """
    inside = transformers_models(modules, outermost=True) or [""]
    found: list[list[str]] = []
    towers: list[str] = []
    for root in inside:
        own = {path[len(root) :].lstrip("."): m for path, m in modules.items() if is_inside(path, root)}
        stacks, frozen = _find_own_stacks(modules[root], own)
        found += [[join(root, path) for path in stack] for stack in stacks]
        towers += [join(root, path) for path in frozen]
    return found, towers


def _find_own_stacks(model: nn.Module, modules: Modules) -> tuple[list[list[str]], list[str]]:
    config = getattr(model, "config", None)
    depth = _depth(config)
    stacks = _outermost(modules, lambda blocks: all(_is_block(model, block) for block in blocks))
    if not stacks:
        stacks = _outermost(modules, lambda blocks: len(blocks) == depth and len(set(map(type, blocks))) == 1)
    if len(stacks) < 2 or getattr(config, "is_encoder_decoder", False):
        return [children(modules, stack) for stack in stacks], []
    is_multimodal = _text_config(config) is not config
    if is_multimodal and not _generates(model, modules, stacks):
        return [children(modules, stack) for stack in stacks], []  # two towers that are compared (CLIP)
    chosen = _language_stacks(model, modules, stacks) if is_multimodal else stacks
    # What is left over may be a stack of convolutions in front of the layers (wav2vec2).
    chosen = [stack for stack in chosen if len(repeated_blocks(modules[stack])) == depth] or chosen
    towers = [_tower(stack, chosen) for stack in stacks if stack not in chosen] if is_multimodal else []
    return [children(modules, stack) for stack in chosen], list(dict.fromkeys(towers))


def repeats_one_layer(model: nn.Module, modules: Modules) -> bool:
    """Whether a model of many layers has but one, which it runs many times (ALBERT)."""
    depth = _depth(getattr(model, "config", None)) or 0
    lengths = {len(module) for module in modules.values() if isinstance(module, nn.ModuleList)}
    return depth > 1 and lengths == {1}


def name_layers(modules: Modules, layers: str | Sequence[str | nn.Module]) -> list[str]:
    """Paths of the layers that a caller names.

    Raises:
        ConfigError: If a path doesn't exist, or layers repeat or contain one another.
    """
    if isinstance(layers, str):
        if not isinstance(modules.get(layers), nn.ModuleList | nn.Sequential | nn.ModuleDict):
            raise ConfigError(
                f"layers={layers!r} must be the path of a ModuleList or Sequential. "
                f"The model has: {some(map(repr, list_paths(modules)))}."
            )
        return children(modules, layers)
    path_of = {id(module): path for path, module in modules.items()}
    paths = [layer if isinstance(layer, str) else path_of.get(id(layer), "") for layer in layers]
    for layer, path in zip(layers, paths, strict=True):
        if path not in modules or not path:
            what = repr(layer) if isinstance(layer, str) else type(layer).__name__
            raise ConfigError(
                f"Each of layers= must be a submodule of the model or its path, but got {what}."
            )
    for i, path in enumerate(paths):
        if any(is_inside(path, other) for other in paths[:i] + paths[i + 1 :]):
            raise ConfigError(f"layers= must not repeat or contain one another, but {path!r} does.")
    return paths


def list_paths(modules: Modules) -> list[str]:
    """Paths of all that could be a list of layers."""
    kinds = nn.ModuleList | nn.Sequential | nn.ModuleDict
    return [path for path, module in modules.items() if path and isinstance(module, kinds)]


def _depth(config: Any) -> int | None:
    depth = getattr(_text_config(config), "num_hidden_layers", None)
    return depth if isinstance(depth, int) else None


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # more than one text model
        return config


def _outermost(modules: Modules, accepts: Callable[[list[nn.Module]], bool]) -> list[str]:
    """Paths of the lists of two or more accepted modules that don't lie in one another."""
    found: list[str] = []
    for path, module in modules.items():  # parents come before their children
        blocks = repeated_blocks(module)
        if len(blocks) > 1 and accepts(blocks) and not any(is_inside(path, outer) for outer in found):
            found.append(path)
    return found


def _is_block(model: nn.Module, block: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    names = getattr(model, "_no_split_modules", None) or ()
    return isinstance(block, GradientCheckpointingLayer) or type(block).__name__ in names


def _generates(model: nn.Module, modules: Modules, stacks: Sequence[str]) -> bool:
    """Whether the text of a multimodal model is that of a language model, which reads what the other towers see.

    The body of one without its head generates nothing by itself, but its attention looks back only.
    """
    can_generate = getattr(model, "can_generate", None)
    if can_generate is not None and can_generate():
        return True
    return any(
        getattr(module, "is_causal", False) is True
        for path, module in modules.items()
        if any(is_inside(path, stack) for stack in stacks)
    )


def _language_stacks(model: nn.Module, modules: Modules, stacks: list[str]) -> list[str]:
    """The stacks inside of a multimodal model's language model; all of them where it can't be told."""
    decoder = accessor(model, "get_decoder")
    root = next((path for path, module in modules.items() if module is decoder and module is not model), None)
    inside = [stack for stack in stacks if root and is_inside(stack, root)]
    return inside or [stack for stack in stacks if "text" in stack or "language" in stack] or stacks


def _tower(stack: str, language: list[str]) -> str:
    """The widest module around ``stack`` that holds no language layers."""
    parts = stack.split(".")
    for length in range(1, len(parts) + 1):
        path = ".".join(parts[:length])
        if not any(is_inside(other, path) for other in language):
            return path
    return stack
