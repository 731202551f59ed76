"""What it costs to train each layer: the deeper backward has to go for it, the more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from layersample.layers.rules import Units

# Of a weight in training, beside itself: its gradient, and two moments of an optimizer such as AdamW.
_COPIES = 3


@dataclass(frozen=True)
class LayerCosts:
    """Costs of training each layer, one number a layer.

    Args:
        flops: Multiplications for a token: the gradient of the input down to this layer, and the gradients of
            its weights. Attention scores are left out.
        trained_bytes: Its gradients and the optimizer's state of it.
        activation_bytes: Activations of a token that backward needs from this layer up, taken as the outputs
            of all matrices on the way.
    """

    flops: tuple[float, ...]
    trained_bytes: tuple[float, ...]
    activation_bytes: tuple[float, ...]

    def memory(self, tokens: int) -> tuple[float, ...]:
        """Bytes for a batch of some tokens."""
        pairs = zip(self.trained_bytes, self.activation_bytes, strict=True)
        return tuple(trained + tokens * activations for trained, activations in pairs)

    def subset(self, indices: Sequence[int]) -> LayerCosts:
        """Costs of some of the layers."""
        numbers = (self.flops, self.trained_bytes, self.activation_bytes)
        return LayerCosts(*(tuple(values[index] for index in indices) for values in numbers))


def layer_costs(model: nn.Module, units: Units) -> LayerCosts:
    """Count the costs of each sampled layer from the shapes of its weights.

    Where something below the layers always trains (embeddings), backward goes to the bottom for any layer, and
    what a layer costs is its own weights. Weights that never train (the matrices beside an adapter) are passed by
    backward and get no gradient.

    Args:
        model: The model.
        units: What is sampled, and what always trains.
    """
    parameters = dict(model.named_parameters())
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    own = [[parameters[name] for name in unit.parameters] for unit in units.sampled]
    trained = [[parameters[name] for name in names] for names in units.trained_of_each]
    # A norm's weights multiply too, and a unit may hold no others. A lookup multiplies nothing; a tied head
    # multiplies, and backward passes it for any layer.
    products = [sum(p.numel() for p in unit if p not in embeddings) for unit in own]
    gradients = [sum(p.numel() for p in unit if p not in embeddings) for unit in trained]
    outputs = [sum(_outputs(p) for p in unit if p not in embeddings) for unit in own]
    first = next((i for i, unit in enumerate(own) if not embeddings.intersection(unit)), 0)
    always = [name for group in units.always for name in group.parameters if units.trainable[name]]
    to_the_bottom = any(parameters[name] in embeddings for name in always)
    lowest = [first if to_the_bottom else index for index in range(len(own))]
    return LayerCosts(
        flops=tuple(float(sum(products[low:]) + gradients[i]) for i, low in enumerate(lowest)),
        trained_bytes=tuple(
            float(_COPIES * sum(p.numel() * p.element_size() for p in unit)) for unit in trained
        ),
        activation_bytes=tuple(float(sum(outputs[low:])) for low in lowest),
    )


def count_elements(model: nn.Module, units: Units) -> tuple[int, ...]:
    """Elements of each sampled layer's parameters that train; of shards those of the whole."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return tuple(sum(sizes[name] for name in names) for names in units.trained_of_each)


def _outputs(parameter: torch.Tensor) -> int:
    """Bytes that a matrix puts out for a token; experts of one tensor count as one."""
    return parameter.shape[-2] * parameter.element_size() if parameter.dim() > 1 else 0
