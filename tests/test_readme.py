"""The README's code runs, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from layersample import LayerScheduler, list_projections, list_samplers
from layersample.cli import app as cli
from tests.helpers import make_batch, make_llama

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(r"^(layersample .*?)(?:\s+#.*)?$", TEXT, re.MULTILINE)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    rows = [{k: v[0].tolist() for k, v in make_batch(i, 1).items()} for i in range(8)]
    names: dict[str, Any] = {
        "__name__": "readme",
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loader": [make_batch(i) for i in range(3)],
        "torch": torch,
        "Trainer": Trainer,
        "args": TrainingArguments(
            str(tmp_path), max_steps=2, report_to="none", use_cpu=True, dataloader_pin_memory=False
        ),
        "data": Dataset.from_list(rows),
        "calibration_batches": [make_batch(i) for i in range(2)],
    }
    if "scheduler" in block and "LayerScheduler" not in block:
        names["scheduler"] = LayerScheduler(model, names["optimizer"], "lisa")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), names)


def test_there_is_something_to_test() -> None:
    assert len(BLOCKS) >= 3 and len(COMMANDS) >= 5


def leave(*args: Any, **kwargs: Any) -> None:
    raise typer.Exit()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "_run", lambda config: None)
    monkeypatch.setattr("layersample_benchmarks.side_by_side.command._run", lambda suite, output, jobs: None)
    monkeypatch.setattr(
        "layersample_benchmarks.side_by_side.report.write_report", lambda folder, baseline: ["report.html"]
    )
    monkeypatch.setattr("layersample.training.models.load_any_model", lambda name, report: make_llama())
    for name in ("run.yaml", "suite.yaml"):
        (tmp_path / name).write_text("steps: 3\n")
    monkeypatch.setattr("layersample.planning.planner.plan", leave)  # what it prints is tested with it
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, command.split()[1:])
    assert result.exit_code == 0, result.output


def test_every_built_in_strategy_is_in_a_table() -> None:
    for name, cls in {**list_samplers(), **list_projections()}.items():
        if cls.__module__.startswith("layersample_strategies"):
            assert f"| `{name}` |" in TEXT


def test_pictures_and_commands_of_ci_are_there() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", TEXT):
        assert (ROOT / path).is_file()
    assert (
        len(re.findall(r"^pip install -c constraints.txt -e \"\.\[(?:demo|test)\]\" && ", TEXT, re.MULTILINE))
        == 2
    )
