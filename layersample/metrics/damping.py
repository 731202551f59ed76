"""The loss of a model with some of its layers damped: what they matter to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layersample.layers.unchanged import unchanged
from layersample.sampling.calibration import loss_of
from layersample.unwrapping import unwrap


def damped_losses(
    model: nn.Module, batch: Mapping[str, Any], sets: Sequence[Sequence[str]], damping: float
) -> list[float]:
    """The loss of one batch, for each of some sets of layers that are damped.

    Of a layer with LoRA adapters these are damped, and of another one what it adds to its input: x + ``damping`` ·
    (f(x) − x). The model runs in eval mode without gradients, and is afterwards as it was.

    Args:
        model: A model whose forward returns a ``loss``.
        batch: Its arguments, with labels, which are moved to its device; or a Trainer's own loss of some examples.
        sets: Paths of the layers to damp for each loss.
        damping: What is left of their response (β), from 0 to 1.

    References:
        IST, arXiv 2410.11772.
    """
    model = unwrap(model)
    losses = []
    with unchanged(model), torch.no_grad():
        model.eval()
        for layers in sets:
            with ExitStack() as stack:
                for name in layers:
                    stack.enter_context(damped(model.get_submodule(name), damping))
                losses.append(float(loss_of(model, batch)))
    return losses


@contextmanager
def damped(layer: nn.Module, damping: float) -> Iterator[None]:
    """Damp a layer's adapters, or where it has none, what it adds to its input."""
    held: list[Any] = [getattr(module, "scaling", None) for module in layer.modules()]
    scalings: list[dict[str, float]] = [scaling for scaling in held if isinstance(scaling, dict)]
    handles = []
    before = [dict(scaling) for scaling in scalings]
    for scaling in scalings:
        scaling.update({adapter: value * damping for adapter, value in scaling.items()})
    if not scalings:

        def damp(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            # A layer that changes the shape adds nothing to its input: its whole output is damped.
            start = given if given is not None and given.shape == hidden.shape else torch.zeros_like(hidden)
            less = start + damping * (hidden - start)
            return (less, *output[1:]) if isinstance(output, tuple) else less

        handles.append(layer.register_forward_hook(damp, with_kwargs=True))
    try:
        yield
    finally:
        for scaling, own in zip(scalings, before, strict=True):
            scaling.update(own)
        for handle in handles:
            handle.remove()
