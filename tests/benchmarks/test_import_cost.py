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


@pytest.mark.parametrize("command", ["--help", "--version", "train --help"])
def test_help_needs_no_torch(command: str) -> None:
    code = (
        "import sys; from layersample.cli.app import app\n"
        f"try: app({command.split()!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
