"""The machine and the versions behind a measurement."""

from __future__ import annotations

import platform
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_SLOW = 2.0  # a shared machine's noise stays below


def environment() -> dict[str, Any]:
    """Processor, threads, GPU and versions, to be stored beside every figure."""
    names = ("layersample", "torch", "transformers", "trl", "accelerate", "peft", "badam")
    return {
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: v for name in names if (v := _version(name))},
    }


@cache
def bf16_slowdown() -> float:
    """How many times longer a product of matrices takes in bf16 than in fp32 here, without a GPU; measured.

    Below 1 where the processor has instructions for bf16; about 8 where it hasn't.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        a @ b  # the first one sets up kernels
        taken = []
        for _ in range(3):
            started = time.process_time()
            a @ b
            taken.append(time.process_time() - started)
        seconds[dtype] = min(taken)
    return seconds[torch.bfloat16] / max(seconds[torch.float32], 1e-9)


def warn_of_slow_bf16(precision: str) -> str:
    """What bf16 will cost on this processor and what to choose, in a sentence; empty where it costs nothing more.

    Args:
        precision: Precision of the run, as ``layersample train`` names it.
    """
    if not precision.startswith("bf16") or torch.accelerator.is_available():
        return ""
    slowdown = bf16_slowdown()
    if slowdown < _SLOW:
        return ""
    return (
        f"This processor has no instructions for bf16: a product takes {slowdown:.0f} times as long as in fp32. "
        "Choose --precision fp32 here, or a machine with AVX512_BF16 or AMX."
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
