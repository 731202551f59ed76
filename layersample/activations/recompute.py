"""Selective recomputation: what a cheap elementwise step can give again in backward isn't kept for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from layersample.errors import ConfigError
from layersample.unwrapping import unwrap

_Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


class SelectiveRecompute:
    """Keeps fewer activations of each layer for backward, and computes the rest again: exactly, and cheaply.

    A frozen linear layer keeps nothing. What is left of a frozen layer is what the gradient of its input needs,
    and two things more: the output of an activation function that is then multiplied by a gate (SwiGLU), which
    its input gives again; and, in 16 bits, the float32 copy of its input that a norm makes. Both are replaced
    by what they come from, through torch's hooks on saved tensors: values are the same to the bit.

    Layers under gradient checkpointing keep nothing anyway, and are left alone. Hooks of the user's around the
    forward (``torch.autograd.graph.save_on_cpu``) get what is kept.

    Args:
        model: The model, as it is or wrapped by DDP or ``torch.compile``.

    References:
        Selective activation recomputation: arXiv 2205.05198.

    Example:
        >>> with SelectiveRecompute(model):  # doctest: +SKIP
        ...     model(**batch).loss.backward()
    """

    def __init__(self, model: nn.Module) -> None:
        inner = unwrap(model)
        self._made: dict[int, _Made] = {}
        self._contexts: list[saved_tensors_hooks] = []
        self._norm_input: weakref.ref[Tensor] | None = None
        self._handles: list[RemovableHandle] = [
            inner.register_forward_pre_hook(self._begin),
            inner.register_forward_hook(self._end, always_call=True),
        ]
        for module in inner.modules():
            if _is_activation(module):
                self._handles.append(module.register_forward_hook(self._remember_activation, prepend=True))
            elif "norm" in type(module).__name__.lower():
                self._handles.append(module.register_forward_pre_hook(self._remember_norm_input))

    def close(self) -> None:
        """Keep everything again. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> SelectiveRecompute:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, module: nn.Module, args: Any) -> None:
        outer = _outer_hooks()
        pack, unpack = (self._pack, _unpack) if outer is None else self._inside(*outer)
        self._contexts.append(saved_tensors_hooks(pack, unpack))
        self._contexts[-1].__enter__()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._contexts.pop().__exit__(None, None, None)
        self._made.clear()
        self._norm_input = None

    def _inside(self, keep: Callable[[Tensor], Any], give_back: Callable[[Any], Tensor]) -> _Hooks:
        """Our hooks around the user's, who get what we would keep, and may hold it elsewhere."""

        def pack(tensor: Tensor) -> tuple[Callable[[Tensor], Tensor] | None, Any]:
            packed = self._pack(tensor)
            if isinstance(packed, _Again):
                return packed.function, keep(packed.source)
            return None, keep(packed)

        def unpack(held: tuple[Callable[[Tensor], Tensor] | None, Any]) -> Tensor:
            function, kept = held
            tensor = give_back(kept)
            if function is None:
                return tensor
            with torch.no_grad():
                return function(tensor)

        return pack, unpack

    def _remember_activation(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not _is_first(module, self._remember_activation):  # what it gives may be another's
            return
        if self._contexts and torch.is_grad_enabled() and len(args) == 1 and isinstance(output, Tensor):
            again = _Again(module.forward, args[0].detach(), args[0]._version)
            key = id(output)
            # Forgotten with the output, or it would hold the input of a layer that keeps nothing.
            alive = weakref.ref(output, lambda _: self._made.pop(key, None))
            self._made[key] = _Made(alive, output._version, again)

    def _remember_norm_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._norm_input = weakref.ref(args[0]) if args and isinstance(args[0], Tensor) else None

    def _pack(self, tensor: Tensor) -> Tensor | _Again:
        made = self._made.get(id(tensor))
        if made is not None and made.output() is tensor and made.version == tensor._version:
            return made.again
        source = None if self._norm_input is None else self._norm_input()
        if source is not None and _is_copy(tensor, source):
            return _Again(_Cast(tensor.dtype), source.detach(), source._version)
        return tensor


@dataclass(frozen=True)
class _Again:
    """How a tensor is computed again."""

    function: Callable[[Tensor], Tensor]
    source: Tensor
    version: int


@dataclass(frozen=True)
class _Made:
    """A tensor that can be computed again, as long as it exists unchanged."""

    output: weakref.ref[Tensor]
    version: int
    again: _Again


@dataclass(frozen=True)
class _Cast:
    dtype: torch.dtype

    def __call__(self, source: Tensor) -> Tensor:
        return source.to(self.dtype)


def _outer_hooks() -> _Hooks | None:
    """The hooks that are in force: torch applies the innermost alone, so ours must call them."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:
        raise ConfigError(
            "SelectiveRecompute must find the hooks on saved tensors that are in force, but torch "
            f"{torch.__version__} doesn't tell: train without it (recompute=False)."
        )
    found: _Hooks | None = top(True)
    return found


def _unpack(packed: Tensor | _Again) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    if packed.source._version != packed.version:
        raise RuntimeError(
            "A tensor that backward needs must not be changed in place, but the input of an activation or norm "
            "was: train without selective recomputation."
        )
    with torch.no_grad():
        return packed.function(packed.source)


def _is_activation(module: nn.Module) -> bool:
    """Whether a module is an elementwise function; one that works in place leaves no input to start from."""
    known = type(module).__module__ in _ACTIVATIONS and not isinstance(module, nn.RReLU)
    return known and not any(module.children()) and not any(module.parameters()) and not _in_place(module)


def _is_first(module: nn.Module, hook: Callable[..., Any]) -> bool:
    """Whether a hook sees what a module's forward gives, before any other could change it."""
    anywhere = nn.modules.module._global_forward_hooks
    return not anywhere and next(iter(module._forward_hooks.values()), None) == hook


def _in_place(module: nn.Module) -> bool:
    return bool(getattr(module, "inplace", False))


def _is_copy(tensor: Tensor, source: Tensor) -> bool:
    """Whether a tensor is the other one in a wider type, as the graph tells."""
    if tensor.shape != source.shape or tensor.dtype.itemsize <= source.dtype.itemsize:
        return False
    made_by = tensor.grad_fn
    if made_by is None or made_by.name() != "ToCopyBackward0" or source.grad_fn is None:
        return False
    return made_by.next_functions[0] == (source.grad_fn, source.output_nr)
