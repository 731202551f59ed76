from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layersample_benchmarks import startup_cost


@pytest.mark.parametrize("same", [True, False])
def test_both_ways_are_measured_and_their_losses_compared(
    same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(suite: Any, folder: Path, *, keep_workers: bool) -> dict[str, Any]:
        loss = 1.0 if same or keep_workers else 1.5
        seconds = 9.0 if keep_workers else 60.0
        return {"cpu_seconds": seconds, "wall_seconds": seconds, "parameters": 1234, "losses": [[loss]] * 3}

    monkeypatch.setattr(startup_cost, "measure", measure)
    startup_cost.main(runs=3, rounds=1, output=tmp_path)
    assert json.loads((tmp_path / "startup_cost.json").read_text())["same_losses"] is same
    table = (tmp_path / "startup_cost.md").read_text()
    assert "| a process each | 60.0 | 20.0 |" in table and "| one worker | 9.0 | 3.0 |" in table
    assert ("are the same to the bit" in table) is same and "1,234 parameters" in table
    assert "one worker" in capsys.readouterr().out
