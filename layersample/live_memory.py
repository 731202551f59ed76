"""Bytes of the tensors that are alive, by kind, at every moment of a run; of real tensors or of fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kind = Literal["weights", "gradients", "optimizer_state", "masters", "activations", "logits", "temporary"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage from its first tensor to its end.

    Memory that a kernel takes for itself isn't seen, nor what an allocator rounds up or keeps.

    Args:
        vocabulary: Size of the vocabulary: tensors whose last dimension it is count as logits.

    Attributes:
        moments: For each moment (:meth:`moment`), in the order of their beginning, the bytes by kind when most
            was alive in it.
    """

    def __init__(self, *, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._vocabulary = vocabulary
        self._alive: dict[int, tuple[int, Kind]] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._now: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self._default: Kind = "temporary"
        self._moment: str | None = None
        self.moments: dict[str, dict[Kind, int]] = {}

    @contextmanager
    def moment(self, name: str, new: Kind = "temporary") -> Iterator[None]:
        """Record the peak of a part of the run; what is made in it counts as ``new``, if nothing better is known."""
        before = self._moment, self._default
        self._moment, self._default = name, new
        self._record()
        try:
            yield
        finally:
            self._record()
            self._moment, self._default = before

    def label(self, tensors: Iterable[Tensor | None], kind: Kind) -> None:
        """Say of what kind some tensors are."""
        for tensor in tensors:
            if tensor is not None:
                self._follow(tensor, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and follow what it makes."""
        known, value = _answer(func, args)
        if known:
            return value
        if func is torch.ops.aten.add.Tensor and self._adds_in_place(*args[:2]):
            return args[0]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        return result

    def _adds_in_place(self, total: Any, part: Any) -> bool:
        """Whether autograd would add two gradients in place: it does where nothing else holds the first.

        With fake tensors, as with any subclass, it makes a third tensor, which a run doesn't.
        """
        if not (isinstance(total, FakeTensor) and isinstance(part, FakeTensor)) or torch.is_grad_enabled():
            return False
        if self._moment != "backward" or (total.shape, total.dtype) != (part.shape, part.dtype):
            return False
        # Two hold it: the tensor, and its storage as Python sees it.
        return bool(torch._C._storage_Use_Count(total.untyped_storage()._cdata) <= 2)

    def _follow(self, tensor: Tensor, kind: Kind | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            if kind is not None:
                size, before = self._alive[key]
                self._now[before] -= size
                self._now[kind] += size
                self._alive[key] = size, kind
            return
        size = storage.nbytes()
        kind = kind or (
            "logits" if tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary else self._default
        )
        self._alive[key] = size, kind
        self._now[kind] += size
        self._watched[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._record()

    def _forget(self, key: int) -> None:
        size, kind = self._alive.pop(key)
        self._now[kind] -= size
        del self._watched[key]

    def _record(self) -> None:
        if self._moment is None:
            return
        peak = self.moments.get(self._moment)
        if peak is None or sum(self._now.values()) > sum(peak.values()):
            self.moments[self._moment] = dict(self._now)


def _answer(func: Any, args: Any) -> tuple[bool, Any]:
    """What stands for a fake tensor's values where code asks for them: finite, zero steps done, nothing wrong."""
    asked = args[0] if args else None
    if not isinstance(asked, FakeTensor):
        return False, None
    if func is torch.ops.aten._local_scalar_dense.default:
        return True, True if asked.dtype == torch.bool else asked.dtype.is_floating_point * 1.0 or 0
    if func is torch.ops.aten.nonzero.default:
        return True, asked.new_empty((0, asked.dim()), dtype=torch.int64)
    return False, None
