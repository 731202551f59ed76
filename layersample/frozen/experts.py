"""Fused experts and whatever else reads a frozen weight in a forward of its own: dequantized while that runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from layersample.frozen.matrix import Rounded, storage_of


@contextmanager
def dequantized(module: nn.Module, weights: Mapping[str, Rounded]) -> Iterator[None]:
    """Let a module's forward read frozen weights as if they were whole.

    Autograd keeps none of them for backward: what it saves of one, be it a view, is kept as codes, and dequantized
    when backward asks for it. The hooks around (of selective recomputation, of gradient checkpointing) see all the
    rest, as they would without.

    Args:
        module: The module.
        weights: Its frozen weights, by its own names for them.
    """
    whole = {own: rounded.whole() for own, rounded in weights.items()}
    packing = _Packing({storage_of(whole[own]): rounded for own, rounded in weights.items()})
    module.__dict__.update(whole)  # in front of the parameters, which Python asks for only in __getattr__
    try:
        if torch.is_grad_enabled():
            with saved_tensors_hooks(packing.pack, _unpack):
                yield
        else:
            yield
    finally:
        for own in whole:
            del module.__dict__[own]


class _Packing:
    def __init__(self, rounded: Mapping[int, Rounded]) -> None:
        self._rounded = rounded
        # Hooks don't nest: the innermost pair alone is called, so it must pass on what isn't its own.
        self._around = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack(self, tensor: Tensor) -> Any:
        rounded = self._rounded.get(storage_of(tensor)) if type(tensor) is not nn.Parameter else None
        if rounded is not None and tensor.dtype == rounded.dtype:
            return _View(rounded, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        if self._around is not None:
            pack, unpack = self._around
            return _Other(pack(tensor), unpack)
        return tensor


@dataclass(frozen=True)
class _View:
    """A view of a frozen weight."""

    rounded: Rounded
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def make(self) -> Tensor:
        """Dequantize what it shows: of several matrices the only one that it touches, where that is so."""
        matrix = self.rounded.shape[-2:].numel()
        first = self.offset // matrix
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if 0 not in self.size and len(self.rounded.codes) > 1 and last // matrix == first:
            part = self.rounded.matrix(first).contiguous()
            return part.as_strided(self.size, self.stride, self.offset - first * matrix)
        return self.rounded.whole().as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class _Other:
    """What the hooks around have made of a tensor."""

    packed: Any
    unpack: Any


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _View):
        with torch.no_grad():
            return packed.make()
    if isinstance(packed, _Other):
        unpacked: Tensor = packed.unpack(packed.packed)
        return unpacked
    tensor: Tensor = packed
    return tensor
