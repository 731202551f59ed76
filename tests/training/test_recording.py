from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from layersample import ConfigError, LayerSampler, Measurement, SamplingContext, register
from layersample.config import make_config
from layersample.training.finetune import finetune
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


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")
def test_the_seconds_of_a_step_are_with_those_of_its_switch(
    short_run: dict[str, Any],
) -> None:
    """A sampler that is slow makes a run slow, and its seconds must say so."""

    @register("slow")
    @dataclass(kw_only=True, eq=False)
    class Slow(LayerSampler):
        """Take its time."""

        def measure(self, measurement: Measurement) -> None:
            time.sleep(0.5)

        def sample(self, context: SamplingContext) -> list[int]:
            time.sleep(0.25)
            return [0, 1]

    summary = finetune(make_config(("test", {**short_run, "sampler": "slow"})))
    lines = [
        json.loads(text) for text in (Path(short_run["output"]) / "metrics.jsonl").read_text().splitlines()
    ]
    seconds = {line["step"]: line["seconds"] for line in lines if "loss" in line}
    assert seconds[1] >= 0.75 and seconds[3] >= 0.25 and seconds[5] >= 0.25
    assert summary["seconds"]["training"] == pytest.approx(sum(seconds.values()))
