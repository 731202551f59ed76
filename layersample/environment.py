"""The machine and the versions behind a measurement."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    *(
        "layersample",
        "torch",
        "transformers",
        "trl",
        "accelerate",
        "peft",
        "datasets",
        "bitsandbytes",
        "lightning",
    ),
    "badam",
)
_SLOW = 2.0  # a shared machine's noise stays below


def environment() -> dict[str, Any]:
    """Processor with its instructions, memory, threads, GPU and versions, to be stored beside every figure."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instructions": instructions(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: v for name in _PACKAGES if (v := _version(name))},
    }


def has_bf16() -> bool:
    """Whether this processor multiplies bf16 by instructions of its own; taken to be so where it isn't known.

    Every process of a run answers alike, which a measured time wouldn't: what is computed may depend on it.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    known = [check for name in checks if (check := getattr(torch.cpu, name, None)) is not None]
    return not known or any(check() for check in known)


def describe_processor(its: Mapping[str, Any]) -> str:
    """The processor of an :func:`environment` and its instructions; of one before these were noted its name alone."""
    return ", ".join(filter(None, (its["processor"], its.get("instructions"))))


def instructions() -> str:
    """Which of the processor's instructions torch computes with, such as ``"AVX2"`` or ``"AVX512 with bf16"``.

    Virtual machines call processors of several generations by one name. Seconds differ between these, and bits may.
    """
    found = str(torch.backends.cpu.get_cpu_capability())
    return f"{found} with bf16" if found.startswith("AVX") and has_bf16() else found


@cache
def bf16_slowdown() -> float:
    """How many times longer a product of matrices takes in bf16 than in fp32 here, without a GPU; measured.

    Below 1 where the processor has instructions for bf16. What is computed mustn't depend on it, see
    :func:`has_bf16`.
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


def slow_bf16_warning(precision: str) -> str:
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


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError):  # Windows has no sysconf
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
