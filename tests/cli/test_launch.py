"""The command in several processes, as people start it: by --processes, torchrun on two machines, and accelerate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

from layersample.cli import app, launch
from layersample.errors import ConfigError
from tests.parallel.ranks import environment, free_port

SECONDS = 240  # for anything here, on a machine with other work
EXAMPLES = Path(__file__).parents[2] / "examples"


def options(tiny_model: Path, sums: Path, output: Path, steps: int = 4) -> list[str]:
    given = {
        "model": tiny_model,
        "data": sums,
        "output": output,
        "steps": steps,
        "batch": 2,
        "eval-size": 4,
        "length": 16,
    }
    return ["train", *(part for name, value in given.items() for part in (f"--{name}", str(value)))]


@contextmanager
def started(module: str, *arguments: str, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A command that runs; whatever it has started is gone at the end."""
    running = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**more),
    )
    try:
        yield running
    finally:
        for process in [*ranks_of(running), *([running] if running.poll() is None else [])]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        running.wait()


def ranks_of(running: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = psutil.Process(running.pid).children(recursive=True)
        return found
    except psutil.NoSuchProcess:
        return []


def wait_for(condition: Callable[[], bool], running: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert running.poll() is None and time.monotonic() < end, running.communicate(timeout=SECONDS)[0]
        time.sleep(0.05)


def steps_in(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_text().count("learning_rate") if path.exists() else 0


def ends(running: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = running.communicate(timeout=SECONDS)
    return running.returncode, said


def test_ctrl_c_stops_all_ranks_with_one_checkpoint(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = options(tiny_model, sums, output, steps=100_000)
    with started("layersample", *command, "--processes", "2") as running:
        wait_for(lambda: steps_in(output) >= 2, running)
        children = ranks_of(running)
        running.send_signal(signal.SIGINT)
        code, said = ends(running)
    assert code == 130, said
    assert said.count("Interrupted. A checkpoint is in") == 1 and "Traceback" not in said
    assert f"layersample train --output {output} --resume --processes 2" in said.replace("\n", " ")
    assert said.count("Recognized as prompt and completion") == 1, "one rank speaks"
    [saved] = (output / "checkpoints").iterdir()
    assert len(list(saved.glob("rng_state_*.pth"))) == 2
    assert not any(child.is_running() for child in children)


def test_a_rank_that_dies_ends_all_with_a_word(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = options(tiny_model, sums, output, steps=100_000)
    with started("layersample", *command, "--processes", "2") as running:
        wait_for(lambda: steps_in(output) >= 1, running)
        children = ranks_of(running)
        [rank] = [child for child in children if child.environ().get("RANK") == "1"]
        rank.kill()
        code, said = ends(running)
    assert code == 128 + signal.SIGKILL, said
    assert "rank 1 was ended by SIGKILL, and the others with it" in said and "Traceback" not in said
    assert not any(child.is_running() for child in children)


def test_ranks_end_with_a_checkpoint_when_their_launcher_is_killed(
    tiny_model: Path, sums: Path, tmp_path: Path
) -> None:
    """It can't end them itself then, and they would hold their GPUs."""
    output = tmp_path / "run"
    command = options(tiny_model, sums, output, steps=100_000)
    with started("layersample", *command, "--processes", "2") as running:
        wait_for(lambda: steps_in(output) >= 1, running)
        ranks = [child for child in ranks_of(running) if "RANK" in child.environ()]
        assert len(ranks) == 2
        running.kill()
        _, alive = psutil.wait_procs(ranks, timeout=SECONDS)
        for rank in alive:
            rank.kill()
        _, said = ends(running)
    assert not alive, said
    assert said.count("Interrupted. A checkpoint is in") == 1 and "Traceback" not in said
    assert len(list((output / "checkpoints").glob("checkpoint-*"))) == 1


def test_two_machines_by_an_agent_each(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    command = ["-m", "layersample", *options(tiny_model, sums, tmp_path / "run")]
    rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "1"]
    rendezvous += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    with (
        started("torch.distributed.run", *rendezvous, *command) as one,
        started("torch.distributed.run", *rendezvous, *command) as other,
    ):
        said = [ends(machine) for machine in (one, other)]
    assert [code for code, _ in said] == [0, 0], said
    assert sum("Written to" in text for _, text in said) == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["ranks"]["peak_bytes"]) == 2


def test_accelerate_and_its_file_for_shards(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    """The file of the examples, on the CPU: the Trainer's ranks are two, and FSDP2 cuts the model."""
    file = EXAMPLES / "torchrun" / "fsdp2.yaml"
    launcher = ["launch", "--config_file", str(file), "--num_processes", "2", "--mixed_precision", "no"]
    launcher += ["--main_process_port", str(free_port()), "-m", "layersample"]
    command = options(tiny_model, sums, tmp_path / "run")
    with started("accelerate.commands.accelerate_cli", *launcher, *command) as running:
        code, said = ends(running)
    assert code == 0, said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["ranks"]["shard"] == "fsdp2" and len(summary["ranks"]["peak_bytes"]) == 2
    weights = [rank["weights"] for rank in summary["ranks"]["peak_bytes"]]
    assert all(held < 0.6 * 4 * summary["parameters"] for held in weights)


def run(*arguments: str, **variables: str) -> Any:
    return CliRunner().invoke(app.app, ["train", *arguments], env=variables)


def test_gpus_beyond_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused = run("--gpus", "3")
    assert isinstance(refused.exception, ConfigError)
    assert "at most the GPUs of this machine, which has 2, but got --gpus 3" in str(refused.exception)
    assert "use --processes" in str(refused.exception)
    both = run("--gpus", "2", "--processes", "2")
    assert isinstance(both.exception, ConfigError) and "choose one of them" in str(both.exception)
    assert run("--gpus", "0").exit_code == 2


def test_another_number_than_the_launcher_started() -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    refused = run("--processes", "4", **ranks)
    assert isinstance(refused.exception, ConfigError)
    assert "has started 2 processes on this machine, but the command line asks for 4" in str(
        refused.exception
    )


def test_how_a_run_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", launch.STARTED_WITH):
        monkeypatch.delenv(name, raising=False)
    assert launch.how_to_resume("run") == "layersample train --output run --resume"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.how_to_resume("run").endswith("--resume, by the launcher that started this run")
    monkeypatch.setenv(launch.STARTED_WITH, "--gpus 2")
    assert launch.how_to_resume("run") == "layersample train --output run --resume --gpus 2"
    assert os.environ["RANK"] == "0"
