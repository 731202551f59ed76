"""Bytes of all tensors that are alive, followed operation by operation through a step, by what they are for."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Kind = Literal["weights", "gradients", "optimizer_state", "activations"]
KINDS: tuple[Kind, ...] = ("weights", "gradients", "optimizer_state", "activations")


@dataclass(frozen=True)
class PeakBytes:
    """The moment at which tensors held most bytes.

    Args:
        total: Bytes of all tensors at that moment.
        at_peak: Bytes by kind at that moment; their sum is ``total``.
        largest: The most bytes that each kind held at any moment.
    """

    total: int
    at_peak: dict[Kind, int]
    largest: dict[Kind, int]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage that is made or freed while it is on: ``with LiveBytes(model) as live: ...``.

    A storage counts once, however many tensors view it. What kernels allocate inside of themselves isn't seen.

    Args:
        model: Its parameters and buffers are weights; its gradients are told by hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._ids: dict[int, int] = {}  # of the storages alive, by their address
        self._events: list[tuple[int, int]] = []  # (id of the storage, bytes; negative when freed)
        self._kinds: dict[int, Kind] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def start(self, optimizer_tensors: Iterable[Tensor]) -> LiveBytes:
        """Begin, with what the optimizer holds now."""
        self.mark("optimizer_state", optimizer_tensors)
        parameters = list(self._model.parameters())
        self.mark("weights", [*parameters, *self._model.buffers()])
        self.mark("gradients", [p.grad for p in parameters if p.grad is not None])
        for parameter in parameters:
            if parameter.requires_grad:
                register: Any = parameter.register_post_accumulate_grad_hook
                self._hooks.append(register(self._mark_gradient))
        self.__enter__()  # type: ignore[no-untyped-call]
        return self

    def stop(self, optimizer_tensors: Iterable[Tensor]) -> PeakBytes:
        """End, with what the optimizer holds now, and give the peak."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        self.mark("optimizer_state", optimizer_tensors)
        return replay(self._events, self._kinds)

    def mark(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """Say what some tensors are for; a kind holds from their beginning to their end."""
        for tensor in tensors:
            self._see(tensor)
            self._kinds.setdefault(self._ids[tensor.untyped_storage()._cdata], kind)

    def _mark_gradient(self, parameter: Tensor) -> None:
        # A step in the backward pass has freed it before this hook comes; then it counts among the rest.
        if parameter.grad is not None:
            self.mark("gradients", [parameter.grad])

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._ids:
            number = len(self._events)
            self._ids[address] = number
            self._events.append((number, storage.nbytes()))
            weakref.finalize(storage, partial(self._gone, address, number, storage.nbytes())).atexit = False

    def _gone(self, address: int, number: int, size: int) -> None:
        self._events.append((number, -size))
        self._ids.pop(address, None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, result)
        return result


def replay(events: Iterable[tuple[int, int]], kinds: Mapping[int, Kind]) -> PeakBytes:
    """Go through what was made and freed, in order.

    Args:
        events: Pairs of a storage's id and its bytes, negative where it is freed.
        kinds: What the storages are for, by id; the others are activations.
    """
    now: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    largest, at_peak, total, most = dict(now), dict(now), 0, 0
    for number, size in events:
        kind = kinds.get(number, "activations")
        now[kind] += size
        total += size
        largest[kind] = max(largest[kind], now[kind])
        if total > most:
            most, at_peak = total, dict(now)
    return PeakBytes(most, at_peak, largest)
