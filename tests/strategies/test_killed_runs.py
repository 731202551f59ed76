"""Every sampler in a plain loop that is killed in a backward pass and resumed: the same to the bit."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.strategies.killed_runs import SAVED, cases, run


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the checkpoints that the killed runs have left, by case."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-W", "ignore", "-m", "tests.strategies.killed_runs", str(folder)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    lines = [line for line in done.stdout.splitlines() if line.split()[0] in cases()]
    assert lines == [f"{case} {signal.SIGKILL.value}" for case in cases()], done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("case", cases())
def test_a_killed_run_ends_as_one_that_was_not(case: str, killed: Path, tmp_path: Path) -> None:
    assert [path.name for path in (killed / case).iterdir() if path.is_dir()] == [f"checkpoint-{SAVED}"]
    weights, state = run(case, tmp_path)
    others, other_state = run(case, killed / case)
    assert state == other_state and state["round"] >= 2
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
