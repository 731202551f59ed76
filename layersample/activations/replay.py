"""A module that gives again what it gave before, so that two forwards of a model compute its layers once."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees


class Replay:
    """Notes what a module's forwards give; asked to, gives it again in the same order, where the same comes in.

    Args:
        module: The module. One that is compiled goes its own way, and is computed each time.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before = vars(module).get("forward")  # one that accelerate has put there
        self._forward = module.forward
        self._noted: deque[tuple[Any, Any]] = deque()
        self._replays = False
        vars(module)["forward"] = self._note_or_replay

    def replay(self) -> None:
        """Give from now on what was noted, and compute what wasn't."""
        self._replays = True

    def close(self) -> None:
        """Put the module's own forward back. Safe to call twice."""
        if self._before is None:
            vars(self._module).pop("forward", None)
        else:
            vars(self._module)["forward"] = self._before
        self._noted.clear()

    def _note_or_replay(self, *args: Any, **kwargs: Any) -> Any:
        if self._replays:
            given, output = self._noted.popleft() if self._noted else (None, None)
            return output if _same(given, (args, kwargs)) else self._forward(*args, **kwargs)
        given = trees.tree_map_only(Tensor, torch.clone, (args, kwargs))  # as they are now
        output = self._forward(*args, **kwargs)
        self._noted.append((given, output))
        return output


def _same(one: Any, other: Any) -> bool:
    """Whether arguments are surely the same: of objects only the same ones are."""
    leaves, structure = trees.tree_flatten(one)
    others, its = trees.tree_flatten(other)
    return structure == its and all(map(_same_leaf, leaves, others))


def _same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    is_value = isinstance(one, bool | int | float | str) and type(one) is type(other)
    return one is other or (is_value and bool(one == other))
