"""A run that is killed by SIGKILL and resumed, beside one that wasn't: the same weights to the bit, on the device."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from layersample import Checkpoints, LayerScheduler

from .bench import Bench, Job, Row, loss_of

_STEPS, _SAVE_EVERY, _KILLED_AT = 12, 4, 10


def jobs(bench: Bench) -> dict[str, Job]:
    """One job: three processes."""
    return {"resume": partial(_measure, bench)}


def _measure(bench: Bench) -> Iterator[Row]:
    """Train once in one go, and once with a kill between two checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        whole = _child(bench, Path(folder) / "whole", None)
        killed = _child(bench, Path(folder) / "killed", _KILLED_AT)
        resumed = _child(bench, Path(folder) / "killed", None)
    setting = f"killed at step {_KILLED_AT} of {_STEPS}, last checkpoint at {_KILLED_AT // _SAVE_EVERY * _SAVE_EVERY}"
    done = killed.returncode == -signal.SIGKILL and whole.returncode == resumed.returncode == 0
    same = done and whole.stdout == resumed.stdout and len(whole.stdout.strip()) == 64
    figures = {
        "whole": whole.stdout.strip(),
        "resumed": resumed.stdout.strip(),
        "errors": {
            "whole": whole.stderr[-2000:],
            "killed": killed.stderr[-2000:],
            "resumed": resumed.stderr[-2000:],
        },
    }
    yield Row("resume", setting, f"same bits: {same}", "same bits", "met" if same else "MISS", figures)


def _child(bench: Bench, folder: Path, kill_at: int | None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "layersample_benchmarks.gpu.resume", str(folder), bench.device.type]
    command += ["--tiny"] if bench.tiny else []
    command += [] if kill_at is None else ["--kill-at", str(kill_at)]
    # The same bits need the same kernels.
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def main(
    folder: Path,
    device: str,
    tiny: Annotated[bool, typer.Option()] = False,
    kill_at: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Train from the last checkpoint in a folder, and print a hash of the weights."""
    torch.use_deterministic_algorithms(True)
    bench = Bench(torch.device(device), tiny)
    shape = bench.shape("tinyllama-1.1b")
    model = bench.model(shape, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scheduler = LayerScheduler(model, optimizer, "lisa", num_active=1, period=3, state="offload")
    checkpoints = Checkpoints(folder, {"model": model, "optimizer": optimizer, "scheduler": scheduler})
    for step in range(checkpoints.load_last(), _STEPS):
        loss_of(model, bench.tokens(shape, 1, 32, seed=step)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if (step + 1) % _SAVE_EVERY == 0:
            checkpoints.save(step + 1)
    digest = hashlib.sha256()
    for weight in scheduler.fp32_state_dict().values():
        digest.update(weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    typer.run(main)
