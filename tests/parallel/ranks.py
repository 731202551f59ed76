"""Runs checks on two processes that talk by gloo, and what the checks share.

    python tests/parallel/ranks.py MODULE FOLDER RANK SIZE

calls the functions ``check_*`` of a module (``ranks_ddp``, ``ranks_fsdp``) with the folder, and writes the name
of each that passed into ``FOLDER/MODULE.RANK.passed``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from layersample import LayerScheduler
from tests.helpers import make_batch, make_llama

SECONDS = 300  # for all checks of a module, on a machine with other work
NUM_LAYERS = 4


# In the test's process


def environment(**more: str) -> dict[str, str]:
    """Two ranks on this machine alone, one thread each."""
    return {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),  # for tests.helpers
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(module: str, folder: Path, size: int = 2) -> tuple[set[str], str]:
    """Run a module's checks on some ranks; return the names that passed on all of them, and what they printed.

    A port may be taken between the moment it is found and the moment it is used, so there is one retry.
    """
    for attempt in range(2):
        passed, output = _launch(module, folder / str(attempt), size)
        if passed == set(checks_of(module)):
            break
    return passed, output


def checks_of(module: str) -> list[str]:
    """The names of a module's checks, in their order, without importing it."""
    text = (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
    return [line[4:].partition("(")[0] for line in text.splitlines() if line.startswith("def check_")]


def _launch(module: str, folder: Path, size: int) -> tuple[set[str], str]:
    folder.mkdir(parents=True)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    logs = [folder / f"{rank}.log" for rank in range(size)]
    with contextlib.ExitStack() as stack:
        ranks = []
        for number, log in enumerate(logs):
            ranks.append(
                subprocess.Popen(
                    [sys.executable, __file__, module, str(folder), str(number), str(size)],
                    env=environment(RANK=str(number), LOCAL_RANK=str(number), **address),
                    stdout=stack.enter_context(open(log, "wb")),
                    stderr=subprocess.STDOUT,
                )
            )
        end = time.monotonic() + SECONDS
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            if any(rank.poll() for rank in ranks):  # the others wait for it in vain
                break
            time.sleep(0.1)
        for rank in ranks:
            rank.kill()
            rank.wait()
    passed = [set(path.read_text().split()) for path in folder.glob(f"{module}.*.passed")]
    return set.intersection(*passed) if len(passed) == size else set(), "\n".join(
        log.read_text(errors="replace") for log in logs
    )


# On each rank


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LayerScheduler | None,
    steps: range,
    *,
    accumulate: int = 1,
    part: slice = slice(None),
    unsynced: Callable[[bool], Any] = lambda last: contextlib.nullcontext(),
) -> None:
    """Train on a part of the same batches: all of them on one rank, every second row on two.

    Args:
        unsynced: The context of a micro-batch, given whether it is the last one of its step.
    """
    model.train()
    for step in steps:
        for micro in range(accumulate):
            batch = {k: v[part] for k, v in make_batch(100 * step + micro, 4).items()}
            with unsynced(micro == accumulate - 1):
                (model(**batch, use_cache=False).loss / accumulate).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def alone(
    steps: int = 8, *, accumulate: int = 1, model: nn.Module | None = None, **options: Any
) -> nn.Module:
    """The same run in one process: the reference."""
    model = model or make_llama(NUM_LAYERS, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with LayerScheduler(model, optimizer, "lisa", **{"period": 2, "seed": 1, **options}) as scheduler:
        train(model, optimizer, scheduler, range(steps), accumulate=accumulate)
    return model


def own_rows() -> slice:
    return slice(dist.get_rank(), None, dist.get_world_size())


def assert_close(model: nn.Module | None, reference: nn.Module | None, tolerance: float = 1e-9) -> None:
    """Parameters are the same but for rounding, and moved at all."""
    assert model is not None and reference is not None
    expected = dict(reference.named_parameters())
    start = dict(make_llama(NUM_LAYERS, dtype=torch.float64).named_parameters())
    moved = 0
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        value = parameter.detach()
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        torch.testing.assert_close(value, expected[name].detach(), rtol=0, atol=tolerance, msg=name)
        moved += not torch.allclose(value.double(), start[name], atol=1e-4)
    assert moved > 10


def main(module: str, folder: str, rank: str, size: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=int(rank), world_size=int(size), timeout=timedelta(seconds=40))
    code = 0
    try:
        checks = importlib.import_module(module)
        for name in checks_of(module):
            start = time.monotonic()
            getattr(checks, name)(Path(folder))
            with open(Path(folder) / f"{module}.{rank}.passed", "a") as passed:
                passed.write(name + "\n")
            print(f"{name} passed in {time.monotonic() - start:.1f} s", flush=True)
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo may wait for a rank that is gone.
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
