from __future__ import annotations

import json
from pathlib import Path

import pytest

from layersample_benchmarks import attach_cost


def test_a_start_with_layer_sampling_is_compared_with_a_plain_one(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attach_cost.main(model=str(tiny_model), rounds=1, output=tmp_path)
    made, attach, begun = json.loads((tmp_path / "attach_cost.json").read_text())["rows"]
    assert made["plain_cpu_seconds"] > 0 and begun["plain_cpu_seconds"] > 0
    assert attach["attached_cpu_seconds"] > attach["plain_cpu_seconds"] >= 0
    table = (tmp_path / "attach_cost.md").read_text()
    assert "| attach | 0.0 |" in table and "attach" in capsys.readouterr().out
