"""What a run prints of itself."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from layersample.cli.consoles import console, errors
from layersample.cli.display import print_config
from layersample.config import TrainConfig


def _printed(**options: object) -> dict[str, str]:
    console = Console(file=io.StringIO(), width=80)
    print_config(console, TrainConfig.model_validate(options))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return {name: value.strip() for name, _, value in (line.partition(" ") for line in lines)}


def test_options_that_are_off_are_not_shown_unless_that_is_said() -> None:
    shown = _printed()
    assert "None" not in shown.values()
    assert shown["sampler"] == "lisa" and "frozen_weights" not in shown
    assert _printed(frozen_weights="int8")["frozen_weights"] == "int8"
    assert _printed(loss_chunk=None)["loss_chunk"] == "None"


def test_a_period_that_follows_from_epochs_is_not_known_yet() -> None:
    shown = _printed(epochs=2)
    assert "steps" not in shown and "period" not in shown and shown["epochs"] == "2.0"
    assert _printed(epochs=2, period=7)["period"] == "7" and "period" in _printed()


def test_a_path_with_colons_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.print("written to runs/:cat:/model")
    errors.print("no such file: runs/:cat:/model")
    shown = capsys.readouterr()
    assert "runs/:cat:/model" in shown.out and "runs/:cat:/model" in shown.err
