from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from layersample_benchmarks import frozen_cost
from layersample_benchmarks.store import RESULTS


def test_it_measures_bytes_steps_and_switches_of_each_format(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        frozen_cost.main(str(tiny_model), rounds=2, batch=2, length=16, layers="1,3", output=tmp_path)
    finally:
        torch.set_num_threads(threads)
    exact, int8, nf4 = json.loads((tmp_path / "frozen_cost.json").read_text())["rows"]
    assert exact["layers_bytes"] > max(int8["layers_bytes"], nf4["layers_bytes"]) > 0
    for row in (exact, int8, nf4):
        assert row["left_over_bytes"] == 0
        assert row["ends_bytes"] == exact["ends_bytes"] > 0
        assert min(row["step_cpu_seconds"], row["switch_cpu_seconds"]) > 0
    assert "nf4" in capsys.readouterr().out
    assert "two layers train" in (tmp_path / "frozen_cost.md").read_text()


def test_the_stored_figures_are_within_the_bounds() -> None:
    stored = json.loads((RESULTS / "frozen_cost.json").read_text())
    assert (stored["batch"], stored["length"], stored["type"]) == (8, 256, "bf16")
    for row, share, step in zip(stored["rows"], (1.0, 0.60, 0.38), (1.0, 1.05, 1.10), strict=True):
        assert row["layers_over_exact"] <= share and row["left_over_bytes"] == 0
        assert row["step_over_exact"] <= step
        assert row["switch_over_step"] <= 0.25 and row["switch_share_at_period"] < 0.02


def test_what_is_left_over_behind_a_step_is_found(tiny_model: Path) -> None:
    contestant = frozen_cost.Contestant.make(str(tiny_model), "int8", (1, 3), torch.bfloat16)
    batch = frozen_cost.real_batches(str(tiny_model), 2, 16)[0]
    assert contestant.measure_bytes(batch)["left_over"] == 0
    kept: list[torch.Tensor] = []
    embedding = contestant.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: kept.append(output.detach().float()))
    assert contestant.measure_bytes(batch)["left_over"] == kept[0].nbytes > 0
