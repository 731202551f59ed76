"""What a module does while weights of it are frozen: its forward, its state and its moves see through the codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layersample.frozen.experts import dequantized
from layersample.frozen.holdable import is_conv1d, is_linear
from layersample.frozen.matrix import FrozenMatrix
from layersample.frozen.products import frozen_conv1d, frozen_linear


class FrozenModule:
    """Stands in front of one module of a model, whose weights may be frozen.

    Its hooks on ``state_dict`` give and take exact values. ``forward`` and ``_apply`` are in the place of the
    module's own only while one of its weights is frozen.

    Args:
        module: The module.
        matrices: Its weights that can be frozen.
    """

    def __init__(self, module: nn.Module, matrices: Iterable[FrozenMatrix]) -> None:
        self._module = module
        self._matrices = {matrix.own: matrix for matrix in matrices}
        self._shows_exact = False
        self.was_called = False
        """Whether its forward has run since this was last set to False."""
        self._loading: dict[str, Any] = {}
        hooks: Any = module  # its methods have no types
        self._handles = [
            hooks.register_state_dict_post_hook(partial(self._give_exact)),  # torch marks it
            hooks.register_load_state_dict_pre_hook(self._begin_loading),
            hooks.register_load_state_dict_post_hook(self._end_loading),
        ]

    @property
    def _frozen(self) -> dict[str, FrozenMatrix]:
        return {own: matrix for own, matrix in self._matrices.items() if matrix.rounded is not None}

    def update(self) -> None:
        """Stand in the place of the module's own methods, or not, as its weights are now."""
        if self._frozen:
            self._module.forward = self._forward
            self._module._apply = self._apply  # type: ignore[method-assign]
        else:
            vars(self._module).pop("forward", None)
            vars(self._module).pop("_apply", None)

    def show(self, exact: bool) -> None:
        """Have the frozen weights show their exact values, and forward multiply by these."""
        self._shows_exact = exact
        for matrix in self._matrices.values():
            matrix.show(exact)

    def close(self) -> None:
        """Leave the module as it was found; its weights must be whole."""
        for handle in self._handles:
            handle.remove()
        self.update()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self.was_called = True
        module, frozen = self._module, self._frozen
        inputs = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if self._shows_exact:
            with _on_device(module, frozen, None if inputs is None else inputs.device):
                return type(module).forward(module, *args, **kwargs)
        for matrix in frozen.values():
            matrix.check_used()
        if is_linear(module) or is_conv1d(module):
            rounded, bias = frozen["weight"].rounded, module.bias
            assert inputs is not None and rounded is not None and not isinstance(bias, nn.Module)
            product: Callable[..., Tensor] = frozen_linear if is_linear(module) else frozen_conv1d
            return product(inputs, rounded, bias)
        with dequantized(module, {own: m.rounded for own, m in frozen.items() if m.rounded is not None}):
            return type(module).forward(module, *args, **kwargs)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """``module.to(...)``, which would make a whole weight of nothing, and leave the codes behind."""
        module, frozen = self._module, self._frozen
        parameters = {own: matrix.parameter for own, matrix in frozen.items()}
        for own in parameters:
            module._parameters[own] = None
        try:
            type(module)._apply(module, function, recurse)  # type: ignore[no-untyped-call]
        finally:
            module._parameters.update(parameters)
        for own, matrix in frozen.items():
            sample = function(torch.empty(1, dtype=parameters[own].dtype, device=matrix.tensors[0].device))
            matrix.move(sample.device, sample.dtype)
        return module

    # A checkpoint

    def _give_exact(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for own, matrix in self._frozen.items():
            if prefix + own in state and not self._shows_exact:
                state[prefix + own] = matrix.exact()

    def _begin_loading(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for own, matrix in self._frozen.items():
            if isinstance(state.get(prefix + own), Tensor):
                self._loading[own] = matrix.begin_loading(state[prefix + own])

    def _end_loading(self, module: nn.Module, incompatible: Any) -> None:
        for own, same in self._loading.items():
            self._matrices[own].end_loading(same)
        self._loading.clear()


@contextmanager
def _on_device(
    module: nn.Module, frozen: dict[str, FrozenMatrix], device: torch.device | None
) -> Iterator[None]:
    """Exact values on the device that the module computes on, while it runs: one module's at a time."""
    away = {
        own: matrix.parameter.to(device)
        for own, matrix in frozen.items()
        if device is not None and matrix.parameter.device != device
    }
    vars(module).update(away)
    try:
        yield
    finally:
        for own in away:
            del vars(module)[own]
