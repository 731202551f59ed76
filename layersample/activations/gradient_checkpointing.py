"""Gradient checkpointing without giving up the truncated backward: it still ends at the lowest active layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from layersample.activations.reentrant import ReentrantGuard
from layersample.errors import ConfigError


class TruncatedCheckpointing:
    """Undoes what transformers does to the embedding's output under gradient checkpointing.

    ``gradient_checkpointing_enable()`` makes the embedding's output require a gradient, so backward goes, and
    every layer is computed again, down to the input. Non-reentrant checkpointing doesn't need it. Reentrant
    checkpointing does need an input that requires a gradient, or it drops the layer's gradients without a
    word; so there the input of the lowest active layer is made to require one. Reentrant checkpointing that isn't
    transformers' own is refused where that would happen, see :class:`ReentrantGuard`.

    Args:
        model: The model; gradient checkpointing is looked up at each switch.
        num_stacks: Stacks of layers in the model. Reentrant checkpointing is refused on two: the decoder's
            gradients to the encoder would be lost.
    """

    def __init__(self, model: nn.Module, num_stacks: int) -> None:
        self._model = model
        self._num_stacks = num_stacks
        self._removed: list[nn.Module] = []
        self._handle: RemovableHandle | _GivesGrad | None = None
        self._guard = ReentrantGuard(model)

    def switch(self, layers: Mapping[str, nn.Module]) -> None:
        """Prepare for a period.

        Args:
            layers: The active layers by name, from the input to the output.

        Raises:
            ConfigError: If checkpointing is reentrant and the model has two stacks.
        """
        for module in self._model.modules():
            if getattr(module, "_require_grads_hooks", None):
                module.disable_input_require_grads()  # type: ignore[operator]
                self._removed.append(module)
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._guard.watch(layers)
        if not _is_reentrant(self._model):
            return
        if self._num_stacks > 1:
            raise ConfigError(
                "Gradient checkpointing must be non-reentrant on an encoder-decoder and on two towers, because "
                "reentrant checkpointing loses the gradients of one: pass "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        for lowest in list(layers.values())[:1]:
            if hasattr(lowest, "_gradient_checkpointing_func"):
                self._handle = _GivesGrad(lowest)
            else:
                self._handle = lowest.register_forward_pre_hook(_require_grad_of_input, with_kwargs=True)

    def close(self) -> None:
        """Put everything back as it was."""
        self._guard.close()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        for module in self._removed:
            module.enable_input_require_grads()  # type: ignore[operator]
        self._removed.clear()


def _is_reentrant(model: nn.Module) -> bool:
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and function is not None:
            return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
    return False


class _GivesGrad:
    """Stands before a layer's checkpointing function, and makes the layer's input require a gradient.

    A hook on the layer isn't enough: before transformers 5.23 it runs inside of the checkpoint, which is too late.

    Args:
        layer: A layer with transformers' gradient checkpointing.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._theirs = self._layer._gradient_checkpointing_func
        self.keywords = getattr(self._theirs, "keywords", {})  # as of the partial that it stands for
        self._layer._gradient_checkpointing_func = self

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        changed = _require_grad_of_input(self._layer, args, {})
        return self._theirs(function, *(args if changed is None else changed[0]), **kwargs)

    def remove(self) -> None:
        """Take it away, unless checkpointing has been switched on anew since."""
        if self._layer._gradient_checkpointing_func is self:
            self._layer._gradient_checkpointing_func = self._theirs


def _require_grad_of_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not torch.is_grad_enabled():
        return None
    if not (args and isinstance(args[0], torch.Tensor)):
        raise ConfigError(
            f"Reentrant checkpointing passes a gradient to positional arguments alone, but {type(module).__name__} "
            'gets its input by keyword: pass gradient_checkpointing_kwargs={"use_reentrant": False}, which gives '
            "the same gradients."
        )
    hidden = args[0]
    # Something below trains: its gradient must pass.
    if hidden.requires_grad:
        return None
    return (hidden.detach().requires_grad_(True), *args[1:]), kwargs
