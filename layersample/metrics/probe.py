"""A short LoRA run on a model, to see which layers it changes, that leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn

from layersample.bf16_products import fast_products
from layersample.errors import NEEDS_TRAIN, ConfigError
from layersample.layers.find import Layer, ModelLayers, find_layers
from layersample.layers.unchanged import unchanged
from layersample.metrics.adapters import LoraNorms, lora_norms
from layersample.sampling.calibration import loss_of
from layersample.sampling.pace import PROGRESS, Say, paced
from layersample.unwrapping import exact_model

_ADAPTER = "layersample_probe"


def probe_lora(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    layers: ModelLayers | None = None,
    *,
    steps: int = 20,
    rank: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
    report: Say = PROGRESS.info,
) -> dict[str, LoraNorms]:
    """Train a LoRA on all linear weights of a model's layers, measure it, and take it away again.

    Modules, weights, buffers, ``requires_grad``, gradients, mode and the global random state are afterwards what they
    were, bit by bit, also where it fails.

    Args:
        model: A model whose forward returns a ``loss``.
        batches: Mappings of its arguments, with labels; used again from the start if there are fewer than
            ``steps``.
        layers: Its layers; found by default.
        steps: Optimizer steps (AdamW, no weight decay).
        rank: Rank of the LoRA; its alpha is twice that.
        learning_rate: Learning rate of the LoRA.
        seed: Of its initial weights.
        report: Is told how many steps there are, and how long they will take.

    Raises:
        ConfigError: If there are no batches, PEFT isn't installed, or the loss isn't a finite number.

    References:
        LoRA, arXiv 2106.09685; LISA, arXiv 2403.17919.
    """
    layers = find_layers(model) if layers is None else layers
    batches = list(islice(batches, steps))
    if not batches:
        raise ConfigError("A LoRA probe needs at least one training batch, but got none.")
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with exact_model(model), fast_products(model, report), _with_lora(model, layers, rank, seed):
        _train(
            model,
            paced(cycle(batches), "Training a LoRA to see its norms, steps", steps, report),
            learning_rate,
        )
        return lora_norms(model, layers=_renamed(layers, before, model), adapter_name=_ADAPTER)


@contextmanager
def _with_lora(model: nn.Module, layers: ModelLayers, rank: int, seed: int) -> Iterator[None]:
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ConfigError(f"A LoRA probe {NEEDS_TRAIN}") from error
    targets = _linear_modules(model, layers)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(targets),
        fan_in_fan_out=not any(isinstance(module, nn.Linear) for module in targets.values()),  # Conv1D
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    # PEFT refuses some modules after it has wrapped others, so what takes the wrappers away stands around it.
    with unchanged(model, hide_gradients=True), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        LoraModel(model, {_ADAPTER: config}, _ADAPTER)
        model.train()
        yield


def _renamed(layers: ModelLayers, before: Mapping[str, int], model: nn.Module) -> ModelLayers:
    """Layers and groups by the names that their parameters have now that wrappers stand in between.

    Args:
        layers: The layers as they were.
        before: Ids of the parameters then.
        model: The model as it is.
    """
    now = {id(parameter): name for name, parameter in model.named_parameters()}

    def rename(layer: Layer) -> Layer:
        return replace(layer, parameters=tuple(now[before[name]] for name in layer.parameters))

    groups = {name: rename(group) for name, group in layers.groups.items()}
    return replace(layers, layers=tuple(map(rename, layers.layers)), groups=groups)


def _linear_modules(model: nn.Module, layers: ModelLayers) -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    own = {name for layer in layers.layers for name in layer.parameters}
    found: dict[str, nn.Module] = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and f"{path}.weight" in own
    }
    if not found:
        raise ConfigError(
            f"A LoRA probe needs linear weights in the layers of {type(model).__name__}: it has none."
        )
    return found


def _train(model: nn.Module, batches: Iterable[Mapping[str, Any]], learning_rate: float) -> None:
    trainable = [p for name, p in model.named_parameters() if _ADAPTER in name]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_ADAPTER in name)
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    for step, batch in enumerate(batches, 1):
        loss: Any = loss_of(model, batch)
        if not bool(torch.isfinite(loss)):
            raise ConfigError(
                f"The loss of the LoRA probe must be finite, but is {loss.item()} at step {step}."
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
