"""The one place that switches on what makes a step hold less: chunked loss, recomputation, checkpointing."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

from torch import nn

from layersample.activations.chunked_loss import ChunkedLoss
from layersample.activations.recompute import SelectiveRecompute
from layersample.errors import ConfigError
from layersample.unwrapping import unwrap
from layersample.versions import checkpoint_activations, stop_checkpointing

logger = logging.getLogger(__name__)


def save_memory(
    model: nn.Module,
    *,
    loss_chunk: int | None,
    recompute: bool,
    gradient_checkpointing: bool = False,
    strict: bool = True,
) -> ExitStack:
    """Switch on what makes a training step hold less between forward and backward.

    It may be called before or after a :class:`~layersample.LayerScheduler` is made for the model.

    Args:
        model: The model, as it is or wrapped by PEFT, DDP or ``torch.compile``.
        loss_chunk: Positions whose logits exist at a time, see :class:`~layersample.ChunkedLoss`; ``None`` or 0
            leaves the model its own loss.
        recompute: Keep fewer activations, exactly, see :class:`~layersample.SelectiveRecompute`.
        gradient_checkpointing: Keep no activations inside of layers, and run each layer again in backward.
        strict: Whether a model that can't have a chunked loss is an error. Otherwise it keeps its own loss, and the
            reason is logged: for callers whose user hasn't asked for it.

    Returns:
        What has been switched on: its ``close()`` puts the model back as it was, and a ``with`` block does at its
        end. Where nothing closes it, the savers stay on for the model's life.

    Raises:
        ConfigError: If the model can't be trained that way. Nothing then stays on it.

    Example:
        >>> with save_memory(model, loss_chunk=128, recompute=True):  # doctest: +SKIP
        ...     model(**batch).loss.backward()
    """
    with ExitStack() as stack:
        if gradient_checkpointing:
            _checkpoint_layers(unwrap(model), stack)
        if loss_chunk:
            _chunk_loss(model, loss_chunk, stack, strict)
        if recompute:
            stack.enter_context(SelectiveRecompute(model))
        return stack.pop_all()


def _chunk_loss(model: nn.Module, positions: int, stack: ExitStack, strict: bool) -> None:
    try:
        stack.enter_context(ChunkedLoss(model, chunk_size=positions))
    except ConfigError as error:
        if strict:
            raise
        _say_once(f"{type(unwrap(model)).__name__} keeps its own loss. {error}")


@lru_cache(maxsize=64)
def _say_once(message: str) -> None:
    logger.warning("%s", message)


def _checkpoint_layers(model: Any, stack: ExitStack) -> None:
    """transformers' gradient checkpointing, non-reentrant, until the stack is closed."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            "Gradient checkpointing needs a model of transformers that supports it, but "
            f"{type(model).__name__} doesn't: train it without."
        )
    if any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    ):  # on already: it stays
        return
    before = _made_to_require_grad(model)
    checkpoint_activations(model, {"use_reentrant": False})
    stack.callback(stop_checkpointing, model)
    for module in _made_to_require_grad(model):
        # Non-reentrant checkpointing doesn't need it, and a backward pass would go down to the embedding.
        if module not in before:
            module.disable_input_require_grads()


def _made_to_require_grad(model: nn.Module) -> list[Any]:
    """Modules whose embedding's output transformers makes require a gradient."""
    return [module for module in model.modules() if getattr(module, "_require_grads_hooks", None)]
