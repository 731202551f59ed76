"""Results that someone, or a full disk, has damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from layersample import ConfigError
from layersample_benchmarks.side_by_side.results import read_results
from layersample_benchmarks.side_by_side.stored_lines import check_line
from layersample_benchmarks.side_by_side.suite import Job
from tests.benchmarks.conftest import MakeSuite

MadeUp = Callable[..., dict[str, Any]]


@pytest.fixture
def line(made_up: MadeUp) -> dict[str, Any]:
    job = Job("lisa", "final", 0, 1e-2, 4)
    own = {"key": job.key, "method": "lisa", "stage": "final", "seed": 0, "learning_rate": 1e-2}
    return json.loads(json.dumps({**own, "fingerprint": "abc", **made_up(job, 2.0)}))  # type: ignore[no-any-return]


def test_a_whole_line_comes_back_as_it_is(line: dict[str, Any]) -> None:
    assert check_line({**line, "more": 1}, "r, line 1") == {**line, "more": 1}
    failed = {k: line[k] for k in ("key", "method", "stage", "seed", "learning_rate", "fingerprint")}
    check_line({**failed, "error": "out of memory"}, "r, line 1")
    check_line({**line, "right": 0.5, "inclusion_probabilities": None}, "r, line 1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": None}, "key: .*valid string.*None"),
        ({"seed": -1}, "seed: "),
        ({"seed": "0"}, "seed: .*valid integer"),
        ({"stage": "middle"}, "stage: "),
        ({"learning_rate": float("nan")}, "learning_rate: .*finite"),
        ({"loss": {"steps": [0], "held_out": []}}, "loss: has 1 steps and 0 losses"),
        ({"loss": []}, "loss: "),
        ({"loss": {"steps": [4], "held_out": [float("inf")]}}, "loss.held_out.0: .*finite"),
        ({"other_loss": {"before": 1.0, "after": float("nan")}}, "other_loss.after: .*finite"),
        ({"training_loss": []}, "training_loss: "),
        ({"right": "yes"}, "right: "),
        ({"other_loss": None}, "is a final run without other_loss"),
        ({"peak_bytes": {"process": -1}}, "peak_bytes.process: "),
        ({"active": [[1, 4, [7]]]}, "names a layer that none of its 3 layers"),
        ({"active": [[1, [0]]]}, "active.0"),
        ({"coverage": 2.0}, "coverage: "),
        ({"environment": {}}, "environment.python: Field required"),
        (
            {"peak_bytes": {"process": 1, "tensors": {"total": 1, "at_peak": {}}}},
            "peak_bytes.tensors.at_peak: ",
        ),
        ({"inclusion_probabilities": [0.5]}, "has 1 inclusion_probabilities and 3 layers"),
    ],
)
def test_a_damaged_line_is_named(line: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"r, line 3: must be what a run has measured, but .*{message}"):
        check_line({**line, **change}, "r, line 3")


@pytest.mark.parametrize("name", ["key", "method", "fingerprint", "loss", "peak_bytes", "seconds", "layers"])
def test_what_is_missing_is_named(line: dict[str, Any], name: str) -> None:
    del line[name]
    with pytest.raises(ConfigError, match=f"but {name}: Field required"):
        check_line(line, "r, line 1")


def test_the_file_and_line_are_named(line: dict[str, Any], tmp_path: Path, make_tiny: MakeSuite) -> None:
    suite = make_tiny(["lisa"]).model_dump(mode="json")
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    whole, path = json.dumps(line), tmp_path / "results.jsonl"
    for text, message in (
        ("[1]", "line 2: must be one JSON object, but is a list"),
        ("null", "line 2: must be one JSON object, but is a NoneType"),
        ("[" * 100_000, "line 2: must be one JSON object, but: maximum recursion"),
        ('{"a": ' + "9" * 5000 + "}", "line 2: must be one JSON object, but: Exceeds"),
        (json.dumps({**line, "method": "lora"}), "must be of a method in suite.yaml, but 'lora' isn't there"),
    ):
        path.write_text(f"{whole}\n{text}\n{whole}\n")
        with pytest.raises(ConfigError, match=f"results.jsonl.*{message}"):
            read_results(tmp_path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match="results.jsonl: must be readable text"):
        read_results(tmp_path)
    path.write_text(f"{whole}\n{whole[:-9]}")  # a benchmark that was killed while it wrote
    assert read_results(tmp_path)[1] == [line]
