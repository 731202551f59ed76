from __future__ import annotations

import json
from pathlib import Path

import pytest

from layersample import ConfigError
from layersample.training.recording import RunRecorder, read_records

LINES = [json.dumps({"step": step, "loss": 1.0 / (step + 1)}) + "\n" for step in range(4)]


def resume(path: Path, text: str) -> RunRecorder:
    path.write_text(text, encoding="utf-8")
    return RunRecorder(path, lambda: None, records=read_records(path, 2))


@pytest.mark.parametrize("cut", ["", LINES[3][:9], LINES[3][:-2], "\0\0\0"])
def test_a_last_line_that_was_cut_short_is_left_out(tmp_path: Path, cut: str) -> None:
    path = tmp_path / "metrics.jsonl"
    recorder = resume(path, "".join(LINES[:3]) + cut)
    assert [record["step"] for record in recorder.records] == [0, 1, 2]
    assert path.read_text() == "".join(LINES[:3])


def test_a_damaged_line_before_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(ConfigError, match="metrics.jsonl, line 2: must be JSON, but: "):
        resume(path, LINES[0] + LINES[1][:9] + "\n" + LINES[2])
