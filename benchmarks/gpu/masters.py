"""Masters of bf16 weights on the device, beside the same on the CPU, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from layersample.optim.masters import combine, split

from .bench import Bench, Job, Row


def jobs(bench: Bench) -> dict[str, Job]:
    """One job: it takes seconds."""
    return {"masters": partial(_measure, bench)}


def _measure(bench: Bench) -> Iterator[Row]:
    """Split fp32 values into bf16 weights and remainders, and put them together again, in both places."""
    values = _values(2**16 if bench.tiny else 2**24)
    device = values.to(bench.device)
    weight = device.bfloat16()
    parts = split(device, weight)
    again = combine(weight, parts)
    on_cpu = split(values, values.bfloat16())
    figures = {"elements": values.numel()}
    whole = _same(again.cpu(), values)
    yield Row(
        "masters", "back from a remainder to the bit", str(whole), "True", "met" if whole else "MISS", figures
    )
    if not bench.on_gpu:
        yield Row("masters", "the same remainders as on a CPU", "", "", "no meaning", figures)
        return
    alike = parts.keys() == on_cpu.keys() and all(_same(parts[key].cpu(), on_cpu[key]) for key in parts)
    alike = alike and _same(weight.float().cpu(), values.bfloat16().float())
    yield Row(
        "masters", "the same remainders as on a CPU", str(alike), "True", "met" if alike else "MISS", figures
    )


def _values(count: int) -> Tensor:
    """Bit patterns of all kinds: of weights, of every size, ties in rounding, zeros, subnormals."""
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31 - 1, (count,), generator=generator, dtype=torch.int64).to(
        torch.int32
    )
    anything = torch.where(anything.view(torch.float32).isfinite(), anything, 0)
    ties = anything[: count // 4] & -65536 | 32768
    ties = torch.where(ties.view(torch.float32).isfinite(), ties, 0)
    weights = torch.randn(count, generator=generator) * 0.02
    return torch.cat(
        [weights, anything.view(torch.float32), ties.view(torch.float32), torch.zeros(8), -torch.zeros(8)]
    )


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.itemsize]
    return torch.equal(first.view(as_bits), second.view(as_bits))
