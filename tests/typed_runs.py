"""Runs of the command as a user types it, in processes of their own: started, killed, resumed and compared."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_weights(one: Path, other: Path) -> bool:
    first, second = (AutoModelForCausalLM.from_pretrained(p / "model").state_dict() for p in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


def start(options: dict[str, Any], **more: Any) -> subprocess.Popen[str]:
    """The command a user types, in a process of its own."""
    flags = [
        part
        for key, value in {**options, **more}.items()
        for part in (
            [f"--{key.replace('_', '-')}"] if value is True else [f"--{key.replace('_', '-')}", str(value)]
        )
    ]
    command = [sys.executable, "-m", "layersample.cli.app", "train", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def resume(folder: Path) -> subprocess.Popen[str]:
    """The command that an interrupted run names."""
    command = [sys.executable, "-m", "layersample.cli.app", "train", "--output", str(folder), "--resume"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    path = folder / "metrics.jsonl"
    wait_for(lambda: path.exists() and any(line["step"] >= step for line in records(folder)), process)


def wait_for(reached: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if reached():
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate()[0])
