from __future__ import annotations

import json
from pathlib import Path

import pytest

from layersample_benchmarks.store import store


def test_a_table_is_printed_and_stored_with_command_and_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store(
        tmp_path / "results",
        "pace",
        {"rows": [1, 2]},
        title="Pace",
        about="Two steps.",
        command="pace --rounds 2",
        headings=("step", "seconds"),
        rows=[["first", "1.5"], ["second", "2.5"]],
        notes=["The second is longer."],
    )
    assert "second" in capsys.readouterr().out
    stored = json.loads((tmp_path / "results" / "pace.json").read_text())
    assert stored["rows"] == [1, 2] and stored["environment"]["versions"]["torch"]
    lines = (tmp_path / "results" / "pace.md").read_text().splitlines()
    assert lines[0] == "# Pace" and lines[2] == "Two steps."
    assert (
        lines[3].startswith("`python -m layersample_benchmarks.pace --rounds 2` on ")
        and "torch 2" in lines[3]
    )
    assert lines[5:] == [
        "| step | seconds |",
        "|---|---|",
        "| first | 1.5 |",
        "| second | 2.5 |",
        "",
        "- The second is longer.",
    ]
