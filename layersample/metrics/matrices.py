"""The weight matrices of a model, layer by layer, each once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from layersample.layers.find import Layer, ModelLayers, find_layers
from layersample.unwrapping import exact_values, unwrap

# What PEFT's wrappers call the module that they wrap; all else inside of them is the adapter.
_WRAPPED = ("base_layer", "original_module")


@dataclass(frozen=True)
class WeightMatrix:
    """One weight of a layer.

    Args:
        name: Name of its parameter, as in ``model.named_parameters()``, with ``[expert]`` behind it for one
            expert of a fused weight.
        layer: Name of its layer, or of its group: ``"embeddings"`` or ``"head"``.
        parameter: Name of its parameter.
        expert: Index in a fused weight ``(num_experts, m, n)``; None for a matrix of its own.
        weight: The matrix ``(m, n)`` itself, not a copy.
    """

    name: str
    layer: str
    parameter: str
    expert: int | None
    weight: Tensor


def weight_matrices(
    model: nn.Module, layers: ModelLayers | None = None, *, embeddings: bool = False
) -> list[WeightMatrix]:
    """List the weight matrices of a model's layers.

    These are the 2-D weights of ``nn.Linear``, GPT-2's ``Conv1D``, ``nn.Embedding`` and the like, and each
    expert of the 3-D weights that transformers fuses experts into. Convolutions, biases and norms are left
    out; a tied weight comes once. Of a PEFT model it lists the base weights, not the adapter's.

    Args:
        model: Any model that ``find_layers`` works on.
        layers: Its layers; found by default. To list a few, replace its ``layers`` by those.
        embeddings: Whether to list the embeddings and the head too, of any size.
    """
    model = unwrap(model)
    layers = find_layers(model) if layers is None else layers
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    units: list[Layer] = list(layers.layers)
    if embeddings:
        units += [layers.groups["embeddings"], layers.groups["head"]]
    found: list[WeightMatrix] = []
    for unit in units:
        for name in unit.parameters:
            if _is_weight(name, parameters[name], modules) and not is_adapter(name, modules):
                found += _split(unit.name, name, parameters[name])
    return found


def is_adapter(parameter: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a parameter was added by a PEFT wrapper around the module that it wraps."""
    parts = parameter.split(".")
    for depth in range(len(parts)):
        wrapper = modules.get(".".join(parts[:depth]))
        wraps = any(isinstance(getattr(wrapper, child, None), nn.Module) for child in _WRAPPED)
        if wraps and parts[depth] not in _WRAPPED:
            return True
    return False


def _is_weight(name: str, parameter: Tensor, modules: dict[str, nn.Module]) -> bool:
    path, _, own = name.rpartition(".")
    if isinstance(modules[path], nn.modules.conv._ConvNd):
        return False
    # A 2-D parameter of another name is a bias of fused experts or a state matrix (Mamba's A_log).
    return (parameter.dim() == 2 and "weight" in own) or (
        parameter.dim() == 3 and min(parameter.shape[1:]) > 1
    )


def _split(layer: str, name: str, parameter: Tensor) -> list[WeightMatrix]:
    weight = exact_values(parameter).detach()
    if weight.dim() == 2:
        return [WeightMatrix(name, layer, name, None, weight)]
    return [
        WeightMatrix(f"{name}[{expert}]", layer, name, expert, matrix) for expert, matrix in enumerate(weight)
    ]
