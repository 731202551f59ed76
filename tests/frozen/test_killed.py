"""The command with frozen weights, killed hard and resumed: it ends to the bit as a run that wasn't."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.typed_runs import kill, resume, same_weights, start, wait_for_step


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nf4"])
def test_a_killed_command_goes_on_to_the_bit(form: str, tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    """In the middle of a period, with layers that have trained and layers that are still in their file."""
    shutil.copytree(tiny_model, tmp_path / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    options = {
        "model": tmp_path / "model", "data": sums, "steps": 32, "period": 20, "num_active": 1, "save_steps": 3,
        "precision": "bf16", "frozen_weights": form, "eval_size": 2, "max_length": 16, "state": "offload",
        "embeddings": "freeze",
    }  # fmt: skip
    for name in ("whole", "run"):
        process = start(options, output=tmp_path / name)
        if name == "run":
            wait_for_step(tmp_path / name, 8, process)
            kill(process)
            assert not (tmp_path / name / "model").exists()
            process = resume(tmp_path / name)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    whole, resumed = (
        torch.load(tmp_path / name / "checkpoints" / "checkpoint-32" / "optimizer.pt", weights_only=True)
        for name in ("whole", "run")
    )
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
