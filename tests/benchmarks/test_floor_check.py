from __future__ import annotations

from typing import Any

import pytest
import torch

from layersample_benchmarks.floor_check import judge, make_contestant


def row(
    where: str, time: float, peak: float, precision: str = "bf16", size: str = "8 × 256"
) -> dict[str, Any]:
    return {
        "method": f"layersample, {where}",
        "precision": precision,
        "size": size,
        "flop_floor": 0.5,
        "step_over_floor": time,
        "peak_over_floor": peak,
        "step_over_full_fp32": time / 3,
        "peak_over_full_fp32": peak / 5,
    }


def test_words_follow_the_numbers() -> None:
    other = {"method": "LoRA", "precision": "bf16", "size": "8 × 256", "step_over_full": 9.0}
    time, peak, *_ = judge([row("top", 1.0, 1.02), row("bottom", 1.04, 1.2), other])
    assert time == "step over the FLOP floor: 1.000 to 1.040; bound 1.05 met by all."
    assert "1.020 to 1.200; bound 1.10 missed by layersample, bottom, bf16, 8 × 256: 1.200." in peak


def test_bounds_over_fp32_are_those_of_bf16_at_the_larger_size() -> None:
    assert len(judge([row("top", 1.0, 1.0, precision="fp32")])) == 2
    assert len(judge([row("top", 1.0, 1.0, size="4 × 128")])) == 2
    *_, time, peak = judge([row("top", 1.5, 1.0)])
    assert "bound 0.40 missed by layersample, top, bf16, 8 × 256: 0.500" in time
    assert "bound 0.23 met by all" in peak


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["BAdam", "LoRA-FA", "layersample, top"])
def test_every_method_takes_a_step(name: str) -> None:
    if name == "BAdam":
        pytest.importorskip("badam")
    contestant = make_contestant(name, "smollm2-135m", "bf16")
    tokens = torch.randint(0, 1000, (1, 16))
    before = {n: p.detach().clone() for n, p in contestant.run.model.named_parameters()}
    contestant.run.step({"input_ids": tokens, "labels": tokens})
    changed = [n for n, p in contestant.run.model.named_parameters() if not torch.equal(p, before[n])]
    assert changed and list(contestant.tensors())
    where = {"BAdam": (".9.",), "LoRA-FA": ("lora_B",), "layersample, top": (".28.", ".29.")}[name]
    assert all(any(part in n for part in where) for n in changed)
