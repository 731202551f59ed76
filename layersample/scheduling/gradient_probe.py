"""Gradients of all layers before the first draw, without a step: some layers at a time, within a run's own memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layersample.errors import ConfigError
from layersample.layers.unchanged import unchanged
from layersample.optim.norms import norm_of
from layersample.sampling.calibration import loss_of
from layersample.sampling.pace import PROGRESS, Say, paced


def probe_gradients(
    model: nn.Module,
    layers: Sequence[Sequence[nn.Parameter]],
    batches: Callable[[], Iterable[Mapping[str, Any]]],
    *,
    count: int,
    at_once: int,
    seed: int = 0,
    prepare: Callable[[Sequence[int]], None] = lambda indices: None,
    report: Say = PROGRESS.info,
) -> list[dict[int, float]]:
    """Take the norm of each layer's gradient on some batches, without training.

    Only ``at_once`` layers require a gradient at a time, and the gradient of each parameter is freed once its norm is
    taken: so a probe holds no more than a step that trains as many layers, and no optimizer state. The model, its
    buffers and gradients, what requires one, and the global random state are afterwards what they were.

    Args:
        model: The model; it runs in training mode.
        layers: Parameters of each layer.
        batches: Gives the batches anew at each call, mappings of the model's arguments with labels.
        count: Most batches.
        at_once: Layers whose gradients are computed at a time.
        seed: Seed of the dropout; it is the same for every layer.
        prepare: Is told the layers of each turn, by their indices, before the model runs.
        report: Is told how many passes there are, and how long they will take.

    Returns:
        For each batch the Frobenius norms by layer; a layer without a gradient is left out.

    Raises:
        ConfigError: If there are no batches, or the model returns no loss.
    """
    turns = [range(start, min(start + at_once, len(layers))) for start in range(0, len(layers), at_once)]
    squares: list[dict[int, Tensor]] = []
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with unchanged(model, hide_gradients=True), torch.random.fork_rng(devices=devices):
        model.train()
        for turn in paced(turns, "Probing the gradients of all layers, turns", len(turns), report):
            chosen = {parameter for index in turn for parameter in layers[index]}
            for parameter in model.parameters():
                parameter.requires_grad_(parameter in chosen)
            prepare(turn)
            _run_turn({index: layers[index] for index in turn}, model, batches, count, seed, squares)
    if not squares:
        raise ConfigError("A probe of gradients needs at least one calibration batch, but got none.")
    return [{index: float(square.sqrt()) for index, square in sorted(own.items())} for own in squares]


def _run_turn(
    layers: Mapping[int, Sequence[nn.Parameter]],
    model: nn.Module,
    batches: Callable[[], Iterable[Mapping[str, Any]]],
    count: int,
    seed: int,
    squares: list[dict[int, Tensor]],
) -> None:
    now: dict[int, Tensor] = {}
    handles = [
        parameter.register_post_accumulate_grad_hook(partial(_take, now, index))  # type: ignore[no-untyped-call]
        for index, own in layers.items()
        for parameter in own
    ]
    try:
        for number, batch in enumerate(batches()):
            if number == count:
                break
            torch.manual_seed(seed + number)
            loss: Any = loss_of(model, batch)
            loss.backward()
            if number == len(squares):
                squares.append({})
            squares[number].update(now)
            now.clear()
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _take(into: dict[int, Tensor], index: int, parameter: Tensor) -> None:
    assert parameter.grad is not None
    gradient = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
    square = norm_of(gradient).square()
    into[index] = into[index] + square.to(into[index].device) if index in into else square
    parameter.grad = None
