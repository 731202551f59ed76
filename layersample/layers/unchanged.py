"""Leave a model as it was: the one thing that every measurement promises, whatever happens in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Dictionaries of a module that are put back entry by entry: handles of hooks refer to the dictionaries themselves.
_CHILDREN = ("_modules", "_parameters", "_buffers")


@contextmanager
def unchanged(
    model: nn.Module, *, hide_gradients: bool = False, only_after_errors: bool = False
) -> Iterator[None]:
    """Put a model back as it was at the end of a block, after an error too; the error is the block's own.

    Put back are the modules and which is whose child, their attributes, hooks, mode and buffers, what requires a
    gradient, and the gradients. The values of parameters aren't: a measurement must not train them.

    Args:
        model: The model.
        hide_gradients: Whether the block sees parameters without gradients, so that a backward pass in it can't
            add to those that are there.
        only_after_errors: Whether to leave alone what the block did if it ends well.
    """
    before = [_Module(module) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    if hide_gradients:
        for parameter, _, _ in parameters:
            parameter.grad = None
    ended_well = False
    try:
        yield
        ended_well = True
    finally:
        # torch 2.8 keeps what autocast has cast without gradients, and the caller's forward would train none.
        torch.clear_autocast_cache()
        if not (ended_well and only_after_errors):
            for module in before:
                module.restore()
            for parameter, requires_grad, gradient in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient


class _Module:
    """One module as it was, without its children's insides."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        own = vars(module)
        self._dictionaries = {key: dict(value) for key, value in own.items() if _is_put_back(key, value)}
        self._attributes = {key: value for key, value in own.items() if key not in self._dictionaries}
        # Those of a norm over batches move in the forward pass.
        self._values = [
            (b, b.detach().clone()) for b in module._buffers.values() if b is not None and not b.is_meta
        ]

    def restore(self) -> None:
        own = vars(self._module)
        for key in own.keys() - self._attributes.keys() - self._dictionaries.keys():
            del own[key]
        own.update(self._attributes)
        for key, entries in self._dictionaries.items():
            if _identities(own[key]) != _identities(entries):
                own[key].clear()
                own[key].update(entries)
        with torch.no_grad():
            for buffer, value in self._values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _is_put_back(key: str, value: object) -> bool:
    return isinstance(value, dict) and (key in _CHILDREN or "_hooks" in key)


def _identities(entries: Mapping[Any, object]) -> list[tuple[Any, int]]:
    """Which objects a dictionary holds, in order: tensors aren't to be compared by their values."""
    return [(key, id(value)) for key, value in entries.items()]
