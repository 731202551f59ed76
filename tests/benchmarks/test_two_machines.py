from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from layersample import ConfigError
from layersample_benchmarks import two_machines
from layersample_benchmarks.side_by_side.results import Results
from layersample_benchmarks.side_by_side.suite import Suite


def write(folder: Path, losses: dict[str, list[float]], made_up: Callable[..., Any], processor: str) -> None:
    """A benchmark with final runs of these losses, one a seed."""
    suite = Suite(methods=["full", "lisa"], seeds=[0, 1], steps=4, learning_rates=[1e-3])
    with closing(Results(folder, suite).open()) as results:
        for name, its in losses.items():
            for job, loss in zip(suite.final_jobs(suite.entry(name), 1e-3), its, strict=False):
                measured = made_up(job, loss)
                measured["environment"] = {**measured["environment"], "processor": processor}
                results.add(job, measured)


def test_the_runs_that_both_have_are_compared(tmp_path: Path, made_up: Callable[..., Any]) -> None:
    write(tmp_path / "here", {"full": [1.0, 1.25], "lisa": [2.0]}, made_up, "a CPU")
    write(tmp_path / "there", {"full": [1.0, 1.125], "lisa": [2.5, 3.0]}, made_up, "another")
    two_machines.main(tmp_path / "here", tmp_path / "there", output=tmp_path)
    full, lisa = json.loads((tmp_path / "two_machines.json").read_text())["rows"]
    assert (full["seeds"], full["means"], full["largest_difference"]) == (2, [1.125, 1.0625], -0.125)
    assert full["spread"] == pytest.approx(0.25 / 2**0.5) and full["peaks"] == [225.0, 212.5]
    assert (lisa["seeds"], lisa["largest_difference"], lisa["spread"]) == (1, 0.5, None)
    table = (tmp_path / "two_machines.md").read_text()
    assert "in here (a CPU, 1 thread) and in there (another, 1 thread)" in table and "| −" not in table


def test_folders_without_a_run_in_common_are_refused(tmp_path: Path, made_up: Callable[..., Any]) -> None:
    write(tmp_path / "here", {"full": [1.0]}, made_up, "a CPU")
    write(tmp_path / "there", {"lisa": [1.0]}, made_up, "another")
    with pytest.raises(ConfigError, match="have final runs of the same row, seed, rate and steps"):
        two_machines.compare(tmp_path / "here", tmp_path / "there")
