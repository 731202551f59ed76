"""A suite on a tiny model, and results that are made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layersample_benchmarks.side_by_side.jobs import Job
from layersample_benchmarks.side_by_side.suite import Suite

MakeSuite = Callable[..., Suite]


@pytest.fixture
def make_tiny(tiny_model: Path, sums: Path) -> MakeSuite:
    """A suite that takes a second a run."""

    def make(methods: list[Any], **more: Any) -> Suite:
        keys: dict[str, Any] = {
            "model": str(tiny_model),
            "task": str(sums),
            "other_text": str(sums),
            "methods": methods,
            "seeds": [0, 1],
            "steps": 4,
            "search_steps": 2,
            "learning_rates": [1e-2],
            "validation_size": 4,
            "test_size": 6,
            "other_size": 4,
            "answers": 0,
            "evaluations": 2,
            "trace_every": 2,
            "max_length": 16,
            "options": {"period": 2},
            "threads": 1,
        }
        return Suite(**{**keys, **more})

    return make


@pytest.fixture
def made_up() -> Callable[..., dict[str, Any]]:
    """What a run would have measured, with a held-out loss of one's choice."""

    def make(job: Job, loss: float, **more: Any) -> dict[str, Any]:
        kinds = {"weights": 100, "gradients": 20, "optimizer_state": 40, "activations": 40}
        phases = {"forward": 1.0, "backward": 2.0, "optimizer": 0.5, "sampling": 0.01}
        measured: dict[str, Any] = {
            "loss": {"steps": [0, job.steps], "held_out": [loss + 1, loss]},
            "training_loss": [loss] * job.steps,
            "right": None,
            "other_loss": {"before": 3.0, "after": 3.1},
            "peak_bytes": {
                "process": int(2**30 * loss),
                "gradients": 20,
                "optimizer_state": 40,
                "tensors": {"total": int(200 * loss), "at_peak": kinds, "largest": kinds},
            },
            "seconds": {"cpu": phases, "wall": phases, "before_training": {"cpu": 0.0, "wall": 0.0}},
            "tokens_per_second": 100.0,
            "layers": ["l.0", "l.1", "l.2"],
            "active": [[1, 2, [0]], [3, job.steps, [1, 2]]],
            "coverage": 1.0,
            "staleness": 0.5,
            "inclusion_probabilities": [0.5, 0.5, 0.5],
            "summary": "Does <things> & more.",
            "parameters": 1000,
            "trainable_parameters": 500.0,
            "options": {},
            "environment": {
                "python": "3.11", "processor": "cpu", "threads": 1, "gpu": None, "versions": {"torch": "2"}, "git": "abc",
            },
        }  # fmt: skip
        measured.update(more)
        if job.stage == "whole":  # each step takes as long
            spent = measured["seconds"]
            each = {kind: [sum(spent[kind].values())] * job.steps for kind in ("cpu", "wall")}
            measured["seconds"] = {"each": each, **spent}
        return measured

    return make
