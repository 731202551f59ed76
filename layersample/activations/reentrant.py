"""Refuses reentrant checkpointing that loses an active layer's gradients, whosever it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.utils.hooks import RemovableHandle

from layersample.errors import ConfigError


class ReentrantGuard:
    """Raises where an active layer runs inside of a reentrant checkpoint whose input requires no gradient.

    Such a checkpoint is an autograd function: the layer runs in it without a graph, and again in backward. Where
    no input of the function requires a gradient, because all below is frozen, autograd never comes back to it, and
    the layer's gradients are lost without a word. That shows in the forward of a module that owns weights, from
    the frames of its callers. Torch's own checkpointing is mended (:class:`ReentrantGradients`), so this is for what
    that can't see (a function that finds its layers by a global variable), and for other libraries' functions. The
    first whole forward of a period is looked at; compiled modules are left alone.

    Args:
        model: The model that is called in training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._trains = False
        self._layers: list[RemovableHandle] = []
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def watch(self, layers: Mapping[str, nn.Module]) -> None:
        """Look after these layers in the next forward, by name, and after no others."""
        for handle in self._layers:
            handle.remove()
        self._layers = [
            module.register_forward_pre_hook(partial(self._check, name))
            for name, layer in layers.items()
            for module in _owners(layer)
        ]

    def close(self) -> None:
        """Look after nothing. Safe to call twice."""
        self.watch({})
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():  # compiled code can't be looked at, and needn't
            self._trains = module.training and torch.is_grad_enabled()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._trains and output is not None:  # the forward didn't fail: the next ones will be like it
            self.watch({})
        self._trains = False

    def _check(self, name: str, module: nn.Module, args: Any) -> None:
        # With a graph there is nothing to lose, and nearly every call ends here.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._trains:
            return
        function = _outermost_function()
        if function is None or any(getattr(function, "needs_input_grad", (True,))):
            return
        raise ConfigError(
            f"An active layer must get its gradient, but {name} runs inside of reentrant checkpointing "
            f"({type(function).__name__.removesuffix('Backward')}) whose input requires none, because everything "
            "below it is frozen: its gradient would be lost without a word. Checkpoint with use_reentrant=False, "
            "which gives the same gradients, or let the embeddings train with embeddings='train'."
        )


def _owners(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that own parameters which train, but for what is compiled: a hook would compile it again."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return
    if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        yield module
    for child in module.children():
        yield from _owners(child)


def _outermost_function() -> FunctionCtx | None:
    """The autograd function whose forward is running; of several in one another the outermost.

    The inner ones run without a graph in any case, and get one when the outermost runs again in backward.
    """
    found = None
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            found = first if isinstance(first, FunctionCtx) else found
        frame = frame.f_back  # type: ignore[assignment]
    return found
