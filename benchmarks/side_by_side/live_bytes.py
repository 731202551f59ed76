"""Bytes of all tensors that are alive, followed operation by operation through a step, by what they are for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layersample.planning.live_memory import FollowsStorages

from .stored_lines import KINDS, Kind


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


class LiveBytes(FollowsStorages):
    """Notes every storage that is made or freed while it is on, and says at the end what each was for.

    Args:
        model: Its parameters and buffers are weights; its gradients are told by hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._ids: dict[int, int] = {}  # of the storages alive, by their address
        self._sizes: dict[int, int] = {}
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
            self._kinds.setdefault(self._ids[self.follow(tensor)], kind)

    def _mark_gradient(self, parameter: Tensor) -> None:
        # A step in the backward pass has freed it before this hook comes; then it counts among the rest.
        if parameter.grad is not None:
            self.mark("gradients", [parameter.grad])

    def begun(self, address: int, size: int, tensor: Tensor) -> None:
        """Number a storage by the event of its beginning: its address may be used again."""
        self._ids[address] = len(self._events)
        self._events.append((self._ids[address], size))
        self._sizes[address] = size

    def ended(self, address: int) -> None:
        """Note the end of a storage."""
        self._events.append((self._ids.pop(address), -self._sizes.pop(address)))


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
