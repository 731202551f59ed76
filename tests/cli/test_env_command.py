from __future__ import annotations

import torch
from typer.testing import CliRunner

from layersample.cli.app import app


def test_it_shows_what_a_bug_report_needs() -> None:
    result = CliRunner().invoke(app, ["env"], env={"COLUMNS": "40", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    shown = dict(line.split(": ", 1) for line in result.output.splitlines())
    assert shown["torch"] == torch.__version__ and shown["layersample"] and shown["memory"].endswith(" GiB")
    assert (shown["GPUs"] == "none") is not torch.cuda.is_available()
    assert {"python", "system", "processor", "product in bf16", "CUDA", "plug-ins"} <= shown.keys()
