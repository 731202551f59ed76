"""Which weights of a model's layers can be held rounded, by what multiplies by them; and why the others can't."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layersample.layers.find import ModelLayers
from layersample.metrics.matrices import is_adapter

_LEAST_ROWS = 8
_LEAST = 256  # elements
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Holdable:
    """The weights of a model's layers.

    Args:
        names: Those that can be held rounded.
        kept: Those that can't, but for norms, biases and other small ones: why not, by name.
    """

    names: tuple[str, ...]
    kept: dict[str, str]


def find_holdable(model: nn.Module, layers: ModelLayers) -> Holdable:
    """Sort the weights of a model's layers.

    Held can be the weights of ``nn.Linear`` and transformers' ``Conv1D``, and the 3-D weights that fused experts
    are; each layer's own, and of a size that is worth it.

    Args:
        model: The model.
        layers: Its layers.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    names: list[str] = []
    kept: dict[str, str] = {}
    for layer in layers.layers:
        for name in layer.parameters:
            parameter = parameters[name]
            if parameter.dim() < 2 or min(parameter.shape) < _LEAST_ROWS or parameter.numel() < _LEAST:
                # A layer of few experts is as large as its matrices.
                if parameter.dim() != 3 or min(parameter.shape[1:]) < _LEAST_ROWS:
                    continue
            path, _, own = name.rpartition(".")
            reason = _why_not(name, parameter, modules, path, own, uses[id(parameter)])
            if reason is None:
                names.append(name)
            else:
                kept[name] = reason
    return Holdable(tuple(names), kept)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is ``nn.Linear`` itself: a class of its own may read the weight elsewhere."""
    return type(module) is nn.Linear


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``, whose weight is ``(in, out)``."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def _why_not(
    name: str, parameter: nn.Parameter, modules: dict[str, Any], path: str, own: str, uses: int
) -> str | None:
    module = modules[path]
    if parameter.dtype not in _FLOATS:
        return f"it is of type {parameter.dtype}"
    if uses > 1:
        return "several modules share it"
    if is_adapter(name, modules):
        return "it is part of an adapter"
    if "forward" in vars(module):
        return f"its {type(module).__name__} has a forward that was put in the place of its own"
    if parameter.dim() == 2 and own == "weight" and (is_linear(module) or is_conv1d(module)):
        return None
    if parameter.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd):
        return None
    return f"{type(module).__name__} isn't a module whose product with it is known"
