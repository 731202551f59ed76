"""Peak bytes of a function as torch's allocator reports them, apart from any simulation of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from layersample.optim.memory_use import count_bytes


def measured_peak(function: Callable[[], object]) -> int:
    """Most bytes that a function held at once, beyond what stood before it.

    On the CPU they are the profiler's allocation events; on a GPU, ``torch.cuda.max_memory_allocated``.

    Args:
        function: What is run, once.
    """
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        function()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measured_step_peak(model: nn.Module, state: Iterable[Tensor], step: Callable[[], object]) -> int:
    """Most bytes in a step, with what stood before it: the model, and what its optimizer holds."""
    held = count_bytes([*model.parameters(), *model.buffers(), *state])
    return int(held + measured_peak(step))
