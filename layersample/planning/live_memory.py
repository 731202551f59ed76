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


class FollowsStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Is told of every storage that operations make while it is on, and of its end.

    A storage counts once, however many tensors view it. Memory that a kernel takes for itself isn't seen, nor what
    an allocator rounds up or keeps. Subclasses say what becomes of a storage: :meth:`begun` and :meth:`ended`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched: dict[int, weakref.ref[Any]] = {}

    def begun(self, address: int, size: int, tensor: Tensor) -> None:
        """A storage was seen for the first time.

        Args:
            address: Where it is; another one may have it after its end.
            size: Its bytes.
            tensor: The tensor that showed it.
        """
        raise NotImplementedError

    def ended(self, address: int) -> None:
        """A storage was freed."""
        raise NotImplementedError

    def follow(self, tensor: Tensor) -> int:
        """Watch a tensor's storage from now on, and give its address."""
        storage = tensor.untyped_storage()
        address: int = storage._cdata
        if address not in self._watched:
            self._watched[address] = weakref.ref(storage, lambda _: self._forget(address))
            self.begun(address, storage.nbytes(), tensor)
        return address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and follow what it makes."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.follow(tensor)
        return result

    def _forget(self, address: int) -> None:
        del self._watched[address]
        self.ended(address)


class LiveMemory(FollowsStorages):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages by kind, from their first tensor to their end.

    Args:
        vocabulary: Size of the vocabulary, if there is one: tensors whose last dimension it is count as logits.

    Attributes:
        moments: For each moment (:meth:`moment`), in the order of their beginning, the bytes by kind when most
            was alive in it.
    """

    def __init__(self, *, vocabulary: int | None) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._alive: dict[int, tuple[int, Kind]] = {}
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
                self._label(self.follow(tensor), kind)

    def leave_out(self, tensors: Iterable[Tensor]) -> int:
        """Don't count some tensors, which aren't on the device in a run; their bytes."""
        total = 0
        for tensor in tensors:
            address = self.follow(tensor)
            size, kind = self._alive[address]
            self._now[kind] -= size
            self._alive[address] = 0, kind
            total += size
        return total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and follow what it makes."""
        if func is torch.ops.aten.add.Tensor and self._adds_in_place(*args[:2]):
            return args[0]
        return super().__torch_dispatch__(func, types, args, kwargs)

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

    def begun(self, address: int, size: int, tensor: Tensor) -> None:
        """Count a storage as logits by its shape, or as what this moment makes."""
        is_logits = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
        kind: Kind = "logits" if is_logits else self._default
        self._alive[address] = size, kind
        self._now[kind] += size
        self._record()

    def ended(self, address: int) -> None:
        """Count a storage no more."""
        size, kind = self._alive.pop(address)
        self._now[kind] -= size

    def _label(self, address: int, kind: Kind) -> None:
        size, before = self._alive[address]
        self._now[before] -= size
        self._now[kind] += size
        self._alive[address] = size, kind

    def _record(self) -> None:
        if self._moment is None:
            return
        peak = self.moments.get(self._moment)
        if peak is None or sum(self._now.values()) > sum(peak.values()):
            self.moments[self._moment] = dict(self._now)
