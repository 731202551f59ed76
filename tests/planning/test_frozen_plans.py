"""What large models hold with frozen weights in 8 or 4 bits: within what the presets promise."""

from __future__ import annotations

import json

import pytest

from layersample.config import make_config, read_preset
from layersample.planning.shapes import load_shape
from layersample.planning.simulation import simulate_step
from layersample_benchmarks.store import RESULTS

# GiB, 1 x 1024 tokens: the run, the most that it may hold, and most of it on the host.
BOUNDS = {
    "--preset lisa-8gb": 6.3,
    "--preset lisa-8gb --master-weights": 9.3,
    "--preset lisa-8gb --frozen-weights int8": 9.0,
    "--preset lisa-8gb --frozen-weights int8 --master-weights": 12.0,
    "--preset lisa-12gb": 11.0,  # a card of 12 GB, with 1 GiB to spare
    "--preset lisa-48gb": 45.5,
}


@pytest.mark.parametrize("run", BOUNDS)
def test_stored_plans_are_within_their_bounds(run: str) -> None:
    rows = {row["run"]: row for row in json.loads((RESULTS / "plan_papers.json").read_text())["rows"]}
    row = rows[run]
    assert row["typical_bytes"] <= row["worst_bytes"] <= BOUNDS[run] * 2**30
    assert row["model"] == ("llama-2-70b" if "48gb" in run else "llama-2-7b")
    layers = 80 * 855_638_016 if "48gb" in run else 32 * 202_375_168  # elements of a layer's matrices
    assert row["host_bytes"] == layers * (4 if "--master-weights" in run else 2)


def test_the_stored_plan_of_the_tightest_bound_is_what_is_planned_now() -> None:
    flags = {"frozen_weights": "int8", "master_weights": True}
    config = make_config(("lisa-8gb", read_preset("lisa-8gb")), ("flags", flags))
    planned = simulate_step(load_shape("llama-2-7b"), config, (0, 31))
    (stored,) = [
        row
        for row in json.loads((RESULTS / "plan_papers.json").read_text())["rows"]
        if row["run"] == "--preset lisa-8gb --frozen-weights int8 --master-weights"
    ]
    assert planned.peak_bytes == stored["worst_bytes"] <= 12.0 * 2**30
