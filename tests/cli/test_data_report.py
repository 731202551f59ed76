from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from layersample import ConfigError
from layersample.cli import app as cli

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated", "ignore::UserWarning")


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["data", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_shows_what_a_model_would_see_and_learn(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "q" * i + "[/x]"}, {"from": "gpt", "value": "yes"}]}
        for i in (1, 2, 90)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    output = invoke(
        str(tmp_path / "a.json"), "--model", str(tiny_model), "--max-length", "50", "--examples", "2"
    )
    assert "Recognized as ShareGPT (conversations): 3 examples." in output
    assert "user: q[/x]\nassistant: «yes\n»" in output and "user: qq[/x]" in output
    assert re.search(r"2\d / 2\d / 11\d", output) and re.search(r"1\d\d, of which \d+ are learned", output), (
        output
    )
    lines = [line.split() for line in output.splitlines()]
    assert [line[-1] for line in lines if line[:1] in (["cut"], ["left"])] == ["1", "1"]


def test_columns_and_everything(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\n1+1?,2\n")
    source = [str(tmp_path / "a.csv"), "--model", str(tiny_model)]
    output = invoke(*source, "--columns", "prompt=question,completion=answer", "--train-on", "all")
    assert "«1+1?2</s>»" in output
    with pytest.raises(ConfigError, match="one of these formats: .* 'question', 'answer'. Give columns"):
        invoke(*source)
    with pytest.raises(
        ConfigError, match="columns: Input should be NAME=COLUMN,NAME=COLUMN, but got 'prompt'"
    ):
        invoke(*source, "--columns", "prompt")
