"""Gradient checkpointing without giving up the truncated backward: it still ends at the lowest active layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from layersample.activations.reentrant import ReentrantGuard
from layersample.activations.reentrant_gradients import ReentrantGradients


class TruncatedCheckpointing:
    """Undoes what transformers does to the embedding's output under gradient checkpointing.

    ``gradient_checkpointing_enable()`` makes the embedding's output require a gradient, so backward goes, and
    every layer is computed again, down to the input. Non-reentrant checkpointing doesn't need it. Reentrant
    checkpointing does need an input that requires a gradient, or it drops the layer's gradients without a
    word: torch's gets one (:class:`ReentrantGradients`), and any other is refused (:class:`ReentrantGuard`).

    Args:
        model: The model; gradient checkpointing is looked up at each switch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._removed: list[nn.Module] = []
        self._gradients = ReentrantGradients(model)
        self._guard = ReentrantGuard(model)

    def switch(self, layers: Mapping[str, nn.Module]) -> None:
        """Prepare for a period.

        Args:
            layers: The active layers by name.
        """
        for module in self._model.modules():
            if getattr(module, "_require_grads_hooks", None):
                module.disable_input_require_grads()  # type: ignore[operator]
                self._removed.append(module)
        self._guard.watch(layers)

    def close(self) -> None:
        """Put everything back as it was."""
        self._guard.close()
        self._gradients.close()
        for module in self._removed:
            module.enable_input_require_grads()  # type: ignore[operator]
        self._removed.clear()
