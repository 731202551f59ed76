"""Units that are smaller than a layer: its attention and its MLP, its modules, or its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from layersample.choices import Granularity
from layersample.errors import ConfigError
from layersample.layers.find import Layer, ModelLayers
from layersample.layers.modules import children, is_inside

# What mixes tokens in a layer, by the names that models have for it; the rest of a layer is its MLP.
_MIXER = re.compile(r"attention|attn|mixer|mamba|temporal|time_mix|conv")


def split_layers(model: nn.Module, layers: ModelLayers, granularity: Granularity) -> tuple[Layer, ...]:
    """The units of all layers, from the input to the output. Each parameter of a layer is in one of them.

    Args:
        model: The model.
        layers: Its layers.
        granularity: ``"layer"``: the layers themselves. ``"block"``: the attention of each layer (or what mixes
            tokens in its place), and all else, its MLP. ``"module"``: each module that owns a matrix.
            ``"tensor"``: each parameter. Norms and other vectors that stand beside the blocks go with one of
            them, in their order: the first of two norms with the attention, the second with the MLP; among the
            modules of a block they go with the first one.

    Raises:
        ConfigError: If the granularity is ``"block"``, and no layer has attention and something beside it.
    """
    if granularity == "layer":
        return layers.layers
    modules, dims = dict(model.named_modules()), {name: p.dim() for name, p in model.named_parameters()}
    blocks = {layer.name: _split_into_blocks(modules, dims, layer) for layer in layers.layers}
    if granularity == "block":
        if all(len(own) == 1 for own in blocks.values()):
            raise ConfigError(
                "granularity='block' needs layers with attention and something beside it, but "
                f"{type(model).__name__} has none in which both are found: choose granularity='module'."
            )
        return tuple(block for own in blocks.values() for block in own)
    split = _split_into_modules if granularity == "module" else _split_into_tensors
    return tuple(unit for own in blocks.values() for block in own for unit in split(modules, dims, block))


def split_group(group: Layer, granularity: Granularity) -> tuple[Layer, ...]:
    """The units of a group that is sampled: itself, or its modules or tensors where it has several."""
    if granularity not in ("module", "tensor"):
        return (group,)
    owners = {_owner({}, name) for name in group.parameters}
    if len(group.parameters if granularity == "tensor" else owners) < 2:
        return (group,)
    if granularity == "tensor":
        return tuple(Layer(name, (name,)) for name in group.parameters)
    by_owner = _by_owner({}, group.parameters)
    return tuple(Layer(path or group.name, tuple(own)) for path, own in by_owner.items())


def _split_into_blocks(
    modules: Mapping[str, nn.Module], dims: Mapping[str, int], layer: Layer
) -> tuple[Layer, ...]:
    parts = {path: _inside(layer.parameters, path) for path in _parts(modules, layer)}
    owned = {path: own for path, own in parts.items() if own}
    vectors = [path for path, own in owned.items() if all(dims[name] < 2 for name in own)]
    mixers = [path for path in owned if path not in vectors and _mixes(modules, path)]
    rest = [path for path in owned if path not in mixers and path not in vectors]
    if not mixers or not rest:
        return (layer,)
    blocks = [[path] for path in mixers] + [rest]  # an MLP comes behind, wherever it is registered
    # Also what the layer owns itself, such as a scale of its output.
    direct = [n for n in layer.parameters if not any(is_inside(n, path) for path in owned)]
    beside = [*(owned[path] for path in vectors), *([name] for name in direct)]
    found = []
    for number, paths in enumerate(blocks):
        norms = [n for i, own in enumerate(beside) if i * len(blocks) // len(beside) == number for n in own]
        names = (*norms, *(name for path in paths for name in owned[path]))
        found.append(
            Layer("+".join([paths[0], *(p.rpartition(".")[2] for p in paths[1:])]), names, layer.name)
        )
    return tuple(found)


def _parts(modules: Mapping[str, nn.Module], layer: Layer) -> list[str]:
    """Paths of what a layer is made of; a list of parts in between (T5's) is looked into."""
    parts = children(modules, layer.name)
    while len(parts) == 1 and isinstance(modules[parts[0]], nn.ModuleList | nn.Sequential):
        parts = children(modules, parts[0])
    return parts


def _mixes(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether a part of a layer is, or holds, what mixes tokens."""
    names = (part.rpartition(".")[2].lower() for part in (path, *children(modules, path)))
    return any(_MIXER.search(name) is not None and "norm" not in name for name in names)


def _split_into_modules(
    modules: Mapping[str, nn.Module], dims: Mapping[str, int], block: Layer
) -> Iterator[Layer]:
    by_owner = _by_owner(modules, block.parameters)
    matrices = {path: own for path, own in by_owner.items() if any(dims[name] > 1 for name in own)}
    if not matrices:
        yield block
        return
    vectors = [name for path, own in by_owner.items() if path not in matrices for name in own]
    for number, (path, own) in enumerate(matrices.items()):
        yield Layer(path, (*(vectors if number == 0 else ()), *own), block.layer)


def _split_into_tensors(
    modules: Mapping[str, nn.Module], dims: Mapping[str, int], block: Layer
) -> Iterator[Layer]:
    for name in block.parameters:
        yield Layer(name, (name,), block.layer)


def _by_owner(modules: Mapping[str, nn.Module], parameters: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in parameters:
        found.setdefault(_owner(modules, name), []).append(name)
    return found


def _owner(modules: Mapping[str, nn.Module], parameter: str) -> str:
    """Path of the module that a parameter belongs to; of an adapter, and of what it wraps, that of the wrapper."""
    parts = parameter.split(".")[:-1]
    for depth in range(1, len(parts)):
        path = ".".join(parts[:depth])
        if path in modules and isinstance(getattr(modules[path], "base_layer", None), nn.Module):
            return path
    return ".".join(parts)


def _inside(parameters: Sequence[str], path: str) -> list[str]:
    return [name for name in parameters if is_inside(name, path)]
