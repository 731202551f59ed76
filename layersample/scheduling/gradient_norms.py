"""Norms of the gradients of active layers, collected for samplers that ask for them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from layersample.optim.norms import norm_of
from layersample.optim.optimizers import Optimizers
from layersample.parallel.base import Engine
from layersample.sampling.statistics import GradientRecord
from layersample.unwrapping import local_part

_SKIPPED = -1.0  # the norm of a step that a GradScaler leaves out


class GradientNorms:
    """Takes the norm of each active layer's gradient in each optimizer step.

    Norms are taken at the end of the backward pass, so before anything clips, projects or changes gradients; whole,
    averaged over ranks, summed over accumulated batches, and with the scale of a ``GradScaler`` undone. With a step
    in the backward pass gradients don't live as long, so their norms are taken one by one, before that clips. A
    gradient that no backward pass has made, but the loop itself, is looked at as the optimizer's step begins.

    Nothing is read from the device before somebody wants to know.

    Args:
        optimizers: The optimizers; the step of the first one ends a step.
        engine: What the model runs in, which knows what other ranks hold of a gradient.
        in_backward: Whether parameters are updated in the backward pass.
    """

    def __init__(self, optimizers: Optimizers, engine: Engine, *, in_backward: bool) -> None:
        engine.check_gradient_norms()
        self._optimizers, self._engine, self._in_backward = optimizers, engine, in_backward
        self._active: dict[int, list[nn.Parameter]] = {}
        self._waiting: list[tuple[tuple[int, ...], Tensor]] = []  # norms of whole steps, on the device
        self._squares: dict[
            Tensor, Tensor
        ] = {}  # with a step in backward: of the pass that runs, by parameter
        self._pending: dict[int, Tensor] = {}  # squares of the last pass, of this rank's parts, by layer
        self._came: set[int] = set()  # layers whose gradients the pass that runs has reached
        self._queued = False
        self._hooks: list[RemovableHandle] = []
        self._handle: RemovableHandle | None = None
        if not in_backward:
            self._handle = optimizers.each[0].register_step_pre_hook(self._end_whole_step)

    def begin(self, active: Mapping[int, Sequence[nn.Parameter]]) -> None:
        """Begin a period.

        Args:
            active: Parameters that train of each active layer, by its index.
        """
        self._unhook()
        self._active = {index: list(parameters) for index, parameters in active.items()}
        for index, own in self._active.items():
            # In front of the hooks that step: they run in the order in which they were put on.
            look = self._on_gradient if self._in_backward else partial(self._note, index)
            for parameter in own:
                hook = parameter.register_post_accumulate_grad_hook(look)  # type: ignore[no-untyped-call]
                self._hooks.append(hook)

    def hand_over(self, record: GradientRecord) -> None:
        """Give what has been taken to a record; here the device is waited for."""
        if self._squares:  # a step in backward has no one end: whoever asks comes after it
            self._end_backward()
        for indices, norms in self._waiting:
            record.add(dict(zip(indices, norms.tolist(), strict=True)))
        self._waiting = []

    def end_step(self) -> None:
        """One more optimizer step is done."""
        if self._squares:
            self._end_backward()

    def close(self) -> None:
        """Take nothing any more. Safe to call twice."""
        self._unhook()
        if self._handle is not None:
            self._handle.remove()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._squares, self._pending, self._came = [], {}, {}, set()
        self._queued = False

    # An ordinary step: norms at the end of the backward pass

    def _note(self, index: int, parameter: Tensor) -> None:
        self._came.add(index)
        if not self._queued:
            self._queued = True
            # DDP and FSDP queue what they do at the end of the pass until it ends; what is queued then comes behind.
            _at_the_end(lambda: _at_the_end(self._end_pass))

    @torch.no_grad()
    def _end_pass(self) -> None:
        self._queued = False
        if self._optimizers.waits:  # gradients become whole in a later pass
            return
        came = {i: own for i, own in self._gradients().items() if i in self._came}
        self._came.clear()
        self._pending |= _squares(came)

    @torch.no_grad()
    def _end_whole_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        there = self._gradients()
        taken = {i: squares for i, squares in self._pending.items() if i in there}
        now = _squares({i: own for i, own in there.items() if i not in taken})
        self._pending, self._came, self._queued = {}, set(), False
        if not there:
            return
        # A fused optimizer undoes the scale itself, in its step; else it is undone by now, but not in what was taken.
        fused, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        scale = _scale_of_caller() if taken else None
        indices = (*taken, *now)
        device = next(iter({**taken, **now}.values())).device
        squares = torch.stack([each.to(device) for each in (*taken.values(), *now.values())])
        norms = self._engine.sum_over_shards(squares).sqrt()
        for part, by in ((slice(0, len(taken)), scale), (slice(len(taken), None), fused)):
            if by is not None:
                norms[part] /= by.to(norms.device)
        if overflow is not None:
            norms = torch.where(overflow.to(norms.device) > 0, _SKIPPED, norms)
        self._waiting.append((indices, norms))

    def _gradients(self) -> dict[int, list[Tensor]]:
        found = {
            index: [local_part(p.grad) for p in own if p.grad is not None]
            for index, own in self._active.items()
        }
        return {index: own for index, own in found.items() if own}

    # A step in the backward pass: norms one by one

    @torch.no_grad()
    def _on_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        # Of accumulated batches the last one's is left: then the gradient is whole.
        self._squares[parameter] = norm_of(parameter.grad).square()

    def _end_backward(self) -> None:
        own = {i: [self._squares[p] for p in ps if p in self._squares] for i, ps in self._active.items()}
        there = {index: squares for index, squares in own.items() if squares}
        norms = torch.stack([torch.stack(squares).sum().sqrt() for squares in there.values()])
        self._waiting.append((tuple(there), norms))
        self._squares = {}


def _squares(gradients: Mapping[int, Sequence[Tensor]]) -> dict[int, Tensor]:
    """The sum of squares of each layer's gradients, in one go over all of them."""
    flat = [gradient for own in gradients.values() for gradient in own]
    if not flat:
        return {}
    wide = torch.float64 if any(g.dtype == torch.float64 for g in flat) else torch.float32
    # A CPU has no kernel for all of them: torch would go through them one by one too, and copy those of 16 bits.
    on_cpu = all(gradient.device.type == "cpu" for gradient in flat)
    norms = [norm_of(each) for each in flat] if on_cpu else torch._foreach_norm(flat, 2, dtype=wide)
    parts = iter([norm.to(norms[0].device, wide).square() for norm in norms])
    return {index: torch.stack([next(parts) for _ in own]).sum() for index, own in gradients.items()}


def _at_the_end(function: Callable[[], None]) -> None:
    """Have a function called at the end of the backward pass that runs."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def _scale_of_caller() -> Tensor | None:
    """The scale of the ``GradScaler`` that steps the optimizer, if one does; it tells none but a fused optimizer."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith("grad_scaler.py"):
            scaler = frame.f_locals.get("self")
            if isinstance(scaler, torch.amp.GradScaler):
                return scaler._get_scale_async()
        frame = frame.f_back  # type: ignore[assignment]
    return None
