"""Scores by lm-evaluation-harness, on a task of local files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from layersample import ConfigError
from layersample_benchmarks.side_by_side import harness
from layersample_benchmarks.side_by_side.jobs import Job
from layersample_benchmarks.side_by_side.suite import Suite
from layersample_benchmarks.side_by_side.training import run_job

needs_harness = pytest.mark.skipif(
    harness.find_spec("lm_eval") is None, reason="needs lm-evaluation-harness (extra lm-eval)"
)
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*deprecated"
)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task of two documents, whose answers are the first and the second choice."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "own.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n}?", "right": n}) + "\n" for n in (0, 1)))
    task = {
        "task": "own_task",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(data)},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["no", "yes"],
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(task))
    return folder


@needs_harness
@pytest.mark.parametrize("method", ["lisa", "lora"])
def test_a_run_s_saved_model_is_scored_by_the_harness(
    method: str, tasks: Path, make_tiny: Callable[..., Suite], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    suite = make_tiny([method], lm_eval=["own_task"], lm_eval_tasks=tasks)
    suite.check_data()
    measured = run_job(suite, Job(method, "final", 0, 1e-2, 1), lambda step: None)
    assert measured["lm_eval"].keys() == {"own_task"}
    assert measured["lm_eval"]["own_task"]["acc"] in (0.0, 0.5, 1.0)
    assert "lm_eval" not in run_job(suite, Job(method, "search", 0, 1e-2, 1), lambda step: None)


@needs_harness
def test_a_task_that_is_unknown_or_has_no_data_is_one_sentence(
    tasks: Path, make_tiny: Callable[..., Suite]
) -> None:
    with pytest.raises(ConfigError, match="Unknown task of lm-evaluation-harness 'own_tusk'") as unknown:
        harness.load_tasks(["own_tusk"], tasks)
    assert len(str(unknown.value)) < 250, "the harness has thousands"
    (tasks / "own.jsonl").unlink()
    suite = make_tiny(["lisa"], lm_eval=["own_task"], lm_eval_tasks=tasks)
    with pytest.raises(ConfigError, match="data of the task 'own_task' can't be had here .*local files"):
        suite.check_data()
    with pytest.raises(ConfigError, match="lm_eval_tasks must be a folder of task files"):
        harness.load_tasks(["own_task"], tasks / "none")


def test_without_the_harness_it_is_said(
    monkeypatch: pytest.MonkeyPatch, make_tiny: Callable[..., Suite]
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"lm_eval needs lm-evaluation-harness: pip install \"layersample\[lm-eval\]"
    ):
        make_tiny(["lisa"], lm_eval=["arc_easy"]).check_data()


def test_numbers_alone_are_kept() -> None:
    found: dict[str, Any] = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
        "em,strict": 1,
        "sample_len": 2,
    }
    assert harness._numbers(found) == {"acc": 0.5, "em,strict": 1.0}
