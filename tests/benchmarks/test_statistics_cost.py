from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from layersample_benchmarks import statistics_cost


def test_it_measures_both_on_the_same_steps_and_stores_the_figures(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        statistics_cost.main(str(tiny_model), steps=3, threads=1, layers="1,2", output=tmp_path)
    finally:
        torch.set_num_threads(threads)
    figures = json.loads((tmp_path / "statistics_cost.json").read_text())
    assert len(figures["without"]) == len(figures["collected"]) == 2
    assert min(figures["without"] + figures["collected"]) > 0
    assert "with gradient norms" in capsys.readouterr().out
    assert "Median of the ratios" in (tmp_path / "statistics_cost.md").read_text()
