"""Has torch's reentrant checkpointing give the gradients of layers whose input requires none."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from layersample.errors import ConfigError, short

_MOST = 2000  # things that are looked at to find what a function holds


class ReentrantGradients:
    """Makes ``torch.utils.checkpoint.checkpoint(..., use_reentrant=True)`` right for a model, whoever calls it.

    Reentrant checkpointing is an autograd function, which gets a gradient only where one of its inputs requires one.
    Where all below a layer is frozen none does, and the layer's gradients would be lost without a word. So a
    function that holds what requires a gradient is given one more input that does, as fairscale's checkpointing is;
    the input of the layer still requires none, and backward ends there. Where a ``functools.partial`` holds a tensor
    that requires one, what it holds is handed in as inputs too: layers get an encoder's output by keyword.

    What a function holds is seen in partials, bound methods, closures, defaults, lists, tuples and dictionaries, and
    among the inputs. One that holds more than it uses (a closure over the whole model, ``checkpoint_sequential``)
    gets its gradients too, but backward then goes down to the first of its kind.

    Torch looks up ``CheckpointFunction.apply`` at each call. It is ours as long as a model is looked after.

    Args:
        model: The model; which of its parameters require a gradient is looked up at each call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        _open.add(self)
        if "apply" not in vars(CheckpointFunction):  # what someone else put there stays
            CheckpointFunction.apply = _ours  # type: ignore[method-assign]

    def close(self) -> None:
        """Look after the model no more; with the last one torch's own function is back. Safe to call twice."""
        _open.discard(self)
        if not _open and vars(CheckpointFunction).get("apply") is _ours:
            del CheckpointFunction.apply


_open: WeakSet[ReentrantGradients] = WeakSet()


def _apply(cls: Any, *args: Any) -> Any:
    apply = super(CheckpointFunction, cls).apply
    if cls is not CheckpointFunction or not torch.is_grad_enabled():
        return apply(*args)
    outputs = apply(*_with_gradient(*args))
    _check(outputs, args)
    return outputs


_ours: Any = classmethod(_apply)


def _with_gradient(function: Callable[..., Any], preserve: bool, *args: Any) -> tuple[Any, ...]:
    """The arguments of ``CheckpointFunction.apply``, changed where gradients would be lost."""
    whole = function if type(function) is partial else partial(function)  # a subclass may be called otherwise
    held = (*whole.keywords.values(), *whole.args)
    loses = _require(held)  # if not, it stays in the partial: nothing may be written to what torch keeps
    if (_require(args) and not loses) or not _concerns_us([function, *args]):
        return function, preserve, *args
    run = partial(_run, whole.func, tuple(whole.keywords)) if loses else partial(_run, function, ())
    extra = torch.empty(0, device="cpu", requires_grad=True)
    return run, preserve, extra, *(held if loses else ()), *args


def _run(function: Callable[..., Any], names: tuple[str, ...], extra: Tensor, *inputs: Any) -> Any:
    """Call a function with its first inputs by keyword; the extra one is there to require a gradient."""
    outputs = function(*inputs[len(names) :], **dict(zip(names, inputs, strict=False)))
    if torch.is_grad_enabled():  # in backward, where torch raises if no output requires a gradient
        each = _each(outputs)
        if not _require(each):
            return tuple(_requiring(output) for output in each)
    return outputs


def _check(outputs: Any, args: tuple[Any, ...]) -> None:
    """Make sure that torch has seen what a function returned, if gradients go through it."""
    if not any(isinstance(output, Tensor) for output in _each(outputs)) and _concerns_us(list(args)):
        raise ConfigError(
            "A function under reentrant checkpointing must return a tensor or a tuple of tensors, but one that active "
            f"layers run in returned {short(outputs)}: the gradients of tensors inside of something else would be "
            "lost without a word. Return a tuple, or checkpoint with use_reentrant=False."
        )


def _each(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _requiring(output: Any) -> Any:
    is_number = isinstance(output, Tensor) and (output.is_floating_point() or output.is_complex())
    return output.detach().requires_grad_() if is_number else output


def _require(things: Iterable[Any]) -> bool:
    return any(isinstance(each, Tensor) and each.requires_grad for each in things)


def _concerns_us(things: list[Any]) -> bool:
    """Whether a function holds parameters of a model that is looked after, and anything that requires a gradient."""
    held = list(_held(things))
    if not _require(held):
        return False
    known = {id(p) for each in list(_open) for p in each.model.parameters()}
    return any(id(each) in known for each in held)


def _held(things: list[Any]) -> Iterator[Tensor]:
    """The tensors that some things are or hold, and the parameters of their modules."""
    queue = deque(things)
    seen: set[int] = set()
    while queue and len(seen) < _MOST:
        thing = queue.popleft()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            yield thing
        elif isinstance(thing, nn.Module):
            yield from thing.parameters()
        else:
            queue.extend(islice(_inside(thing), _MOST))


def _inside(thing: Any) -> Iterable[Any]:
    if isinstance(thing, partial):
        return chain([thing.func], thing.args, thing.keywords.values())
    if isinstance(thing, MethodType):
        return thing.__self__, thing.__func__
    if isinstance(thing, FunctionType):
        return chain(_cells(thing), thing.__defaults__ or (), (thing.__kwdefaults__ or {}).values())
    if isinstance(thing, list | tuple):
        return thing
    return thing.values() if isinstance(thing, dict) else ()


def _cells(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a variable that isn't set yet
            yield cell.cell_contents
