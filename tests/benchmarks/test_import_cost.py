from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from layersample_benchmarks import import_cost


def test_it_measures_each_command_and_stores_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {"import torch": ("-c", "pass"), "layersample --version": ("-m", "layersample", "--version")}
    monkeypatch.setattr(import_cost, "_COMMANDS", quick)
    import_cost.main(rounds=1, output=tmp_path)
    rows = json.loads((tmp_path / "import_cost.json").read_text())["rows"]
    assert [row["what"] for row in rows] == list(quick)
    assert all(0 < row["cpu_seconds"] for row in rows)
    assert "layersample --version" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "left_out"),
    [
        ("--help", ["torch", "transformers"]),
        ("--version", ["torch", "transformers", "layersample.config"]),
        ("train --help", ["torch", "transformers"]),
        ("list", ["transformers", "layersample.config"]),
    ],
)
def test_commands_import_only_what_they_need(command: str, left_out: list[str]) -> None:
    code = (
        "import sys; from layersample.cli.app import app\n"
        f"try: app({command.split()!r})\n"
        "except SystemExit as end: assert not end.code\n"
        f"imported = set({left_out!r}) & set(sys.modules); assert not imported, imported"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
