from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from layersample_benchmarks import metric_cost


def test_it_prints_its_figures_and_writes_them(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model().save_pretrained(tmp_path / "model")
    results = tmp_path / "results"
    capsys.readouterr()
    metric_cost.main(
        ["--model", str(tmp_path / "model"), "--rounds", "1", "--batches", "1", "--output", str(results)]
    )
    table = (results / "metric_cost.md").read_text()
    assert capsys.readouterr().out.rstrip() == table.rstrip()
    record = json.loads((results / "metric_cost.json").read_text())
    assert record["matrices"] == 14 and record["max_alpha_difference"] <= 1e-6
    assert all(len(taken) == 1 and taken[0] >= 0 for taken in record["cpu_seconds"].values())
    assert str(tmp_path) not in table + json.dumps(record)


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        metric_cost.main(["--model", "somewhere", "--rounds", "0"])
    assert "at least 1" in capsys.readouterr().err
