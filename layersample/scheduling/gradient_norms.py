"""Norms of the gradients of active layers, collected for samplers that ask for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from layersample.parallel.base import Engine
from layersample.sampling.statistics import GradientRecord
from layersample.unwrapping import local_part, unwrap_optimizer

_SKIPPED = -1.0  # the norm of a step that a GradScaler leaves out


class GradientNorms:
    """Takes the norm of each active layer's gradient in each optimizer step.

    Norms are taken as the optimizer's step begins: whole (before a projection and before masters), averaged over
    ranks, summed over accumulated batches, and with the scale of a ``GradScaler`` undone. What clips gradients in
    front of the step has done so by then: it scales all layers of a step alike. With a step in the backward pass
    gradients don't live as long, so their norms are taken there, before that clips.

    Nothing is read from the device before somebody wants to know.

    Args:
        optimizer: The optimizer that steps first, or accelerate's wrapper of it.
        engine: What the model runs in, which knows what other ranks hold of a gradient.
        in_backward: Whether parameters are updated in the backward pass.
    """

    def __init__(self, optimizer: Optimizer, engine: Engine, *, in_backward: bool) -> None:
        engine.check_gradient_norms()
        self._engine, self._in_backward = engine, in_backward
        self._active: dict[int, list[nn.Parameter]] = {}
        self._waiting: list[tuple[tuple[int, ...], Tensor]] = []  # norms of whole steps, on the device
        self._squares: dict[Tensor, Tensor] = {}  # of the backward pass that runs, by parameter
        self._hooks: list[RemovableHandle] = []
        self._handle: RemovableHandle | None = None
        if not in_backward:
            self._handle = unwrap_optimizer(optimizer).register_step_pre_hook(self._look)

    def begin(self, active: Mapping[int, Sequence[nn.Parameter]]) -> None:
        """Begin a period.

        Args:
            active: Parameters that train of each active layer, by its index.
        """
        self._unhook()
        self._active = {index: list(parameters) for index, parameters in active.items()}
        if self._in_backward:
            # In front of the hooks that step: they run in the order in which they were put on.
            for parameter in (p for own in self._active.values() for p in own):
                hook = parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]
                self._hooks.append(hook)

    def hand_over(self, record: GradientRecord) -> None:
        """Give what has been taken to a record; here the device is waited for."""
        if self._squares:  # a step in backward has no one end: whoever asks comes after it
            self._end_backward()
        for indices, norms in self._waiting:
            record.add(dict(zip(indices, norms.tolist(), strict=True)))
        self._waiting = []

    def close(self) -> None:
        """Take nothing any more. Safe to call twice."""
        self._unhook()
        if self._handle is not None:
            self._handle.remove()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._squares = [], {}

    @torch.no_grad()
    def _look(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        gradients = {
            index: [local_part(p.grad) for p in own if p.grad is not None]
            for index, own in self._active.items()
        }
        there = {index: own for index, own in gradients.items() if own}
        if not there:
            return
        flat = [gradient for own in there.values() for gradient in own]
        norms = torch._foreach_norm(flat, 2, dtype=_wide(flat))
        parts = iter([norm.to(norms[0].device).square() for norm in norms])
        squares = torch.stack([torch.stack([next(parts) for _ in own]).sum() for own in there.values()])
        # A fused optimizer undoes the scale itself, in its step.
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        whole = self._engine.sum_over_shards(squares).sqrt()
        if scale is not None:
            whole = whole / scale.to(whole.device)
        if overflow is not None:
            whole = torch.where(overflow.to(whole.device) > 0, _SKIPPED, whole)
        self._waiting.append((tuple(there), whole))

    @torch.no_grad()
    def _on_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        # Of accumulated batches the last one's is left: then the gradient is whole.
        self._squares[parameter] = torch.linalg.vector_norm(
            parameter.grad, dtype=_wide([parameter.grad])
        ).square()

    def _end_backward(self) -> None:
        own = {i: [self._squares[p] for p in ps if p in self._squares] for i, ps in self._active.items()}
        there = {index: squares for index, squares in own.items() if squares}
        norms = torch.stack([torch.stack(squares).sum().sqrt() for squares in there.values()])
        self._waiting.append((tuple(there), norms))
        self._squares = {}

    def end_step(self) -> None:
        """One more optimizer step is done."""
        if self._squares:
            self._end_backward()


def _wide(gradients: Sequence[Tensor]) -> torch.dtype:
    """16 bits are squared and added up in 32; fp64 stays as it is."""
    return torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
