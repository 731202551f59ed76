"""A Trainer's own loss, for samplers that measure with data: of pairs, of answers that it generates, of texts."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from layersample.hooks import is_users
from layersample.integrations.first_batches import FirstBatches
from layersample.sampling.calibration import OwnLoss
from layersample.unwrapping import unwrap


def has_own_loss(trainer: Trainer) -> bool:
    """Whether a Trainer computes another loss than the one that the model gives with ``labels``."""
    # Of the object: a function may have been put on it.
    overridden = getattr(trainer.compute_loss, "__func__", None) is not Trainer.compute_loss
    return overridden or trainer.compute_loss_func is not None or bool(trainer.args.label_smoothing_factor)


def logits_are_watched(trainer: Trainer) -> bool:
    """Whether a forward hook of somebody else's sees logits: of the model, what is around it, or its head."""
    model: Any = trainer.model
    find_head = getattr(model, "get_output_embeddings", None)
    modules = {model, trainer.model_wrapped, unwrap(model), find_head() if find_head else None}
    hooks = [hook for module in modules if module is not None for hook in module._forward_hooks.values()]
    return any(map(is_users, hooks))


class OwnLosses:
    """Gives the first training examples with the Trainer's own loss of them; nothing of it stays in the Trainer.

    Where a Trainer learns from answers that it generates (GRPO, RLOO), it generates them here as in evaluation, by
    the model as it is now.

    Args:
        trainer: The Trainer, whose training begins.
        loader: Its loader of training data.
        size: Examples of a batch.
    """

    def __init__(self, trainer: Trainer, loader: Any, size: int) -> None:
        self._trainer = trainer
        # Of each question such a Trainer compares several answers.
        repeat = int(getattr(trainer, "num_generations_eval", 1))
        self._read = FirstBatches(loader, size, repeat=repeat)

    def __call__(self) -> Iterator[OwnLoss]:
        """Read them from the first on."""
        for inputs in self._read():
            prepared = _prepare(self._trainer, inputs)
            yield OwnLoss(prepared, partial(_loss, self._trainer, prepared))


def _prepare(trainer: Trainer, inputs: Any) -> Any:
    """What the Trainer computes its loss from: on its device, or generated."""
    assert trainer.model is not None
    was_training = trainer.model.training
    with _no_trace(trainer):
        trainer.model.eval()
        try:
            return trainer._prepare_inputs(inputs)
        finally:
            trainer.model.train(was_training)


def _loss(trainer: Trainer, inputs: Mapping[str, Any], model: nn.Module) -> Tensor:
    with _no_trace(trainer), trainer.compute_loss_context_manager():
        loss: Any = trainer.compute_loss(model, dict(inputs))  # not a pair, as the outputs aren't asked for
    return loss  # type: ignore[no-any-return]


@contextmanager
def _no_trace(trainer: Trainer) -> Iterator[None]:
    """Put back all figures, counters and logs of a Trainer, and the random state, at the end of a block."""
    holders: tuple[Any, ...] = (trainer, trainer.state)
    data = (id(trainer.train_dataset), id(trainer.eval_dataset))  # which may be plain lists, and long
    before = [
        {name: _copy(value) for name, value in vars(h).items() if id(value) not in data and _is_plain(value)}
        for h in holders
    ]
    known = [set(vars(holder)) for holder in holders]
    # The Trainer counts them for each step, and hasn't yet.
    trainer.current_gradient_accumulation_steps = 1
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python_state = random.getstate()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        for holder, values, names in zip(holders, before, known, strict=True):
            for name in set(vars(holder)) - names:
                delattr(holder, name)
            vars(holder).update(values)


def _is_plain(value: object) -> bool:
    """Whether a value is a figure, a text, a tensor, or a collection of such; not an object with a life of its own."""
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple | set | deque):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | str | bytes | Tensor)


def _copy(value: Any) -> Any:
    """A copy of collections; tensors aren't written to, and are kept."""
    if isinstance(value, dict):
        copied = value.copy()  # which keeps a defaultdict's default
        copied.update({key: _copy(item) for key, item in value.items()})
        return copied
    if isinstance(value, list | set):
        return type(value)(map(_copy, value))
    if isinstance(value, deque):
        return deque(map(_copy, value), value.maxlen)
    return value
