"""Scores by lm-evaluation-harness, on a task of local files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

from layersample import ConfigError
from layersample.config import TrainConfig
from layersample.training.models import load_model
from layersample_benchmarks.methods.catalog import get_method
from layersample_benchmarks.side_by_side import harness, plain_words, sections, training
from layersample_benchmarks.side_by_side.analysis import analyze
from layersample_benchmarks.side_by_side.fingerprints import fingerprint
from layersample_benchmarks.side_by_side.jobs import Job
from layersample_benchmarks.side_by_side.scoring import mean_loss
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
@pytest.mark.parametrize("method", ["qlora", "qlora-4bit"])
def test_adapters_beside_four_bits_are_merged_as_a_user_keeps_them(
    method: str, make_tiny: Callable[..., Suite], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the exact model or the rounded one: what is saved has the loss that the run has measured."""
    saved: list[float] = []

    def evaluate(model: Any, tokenizer: Any, *_: Any, **__: Any) -> dict[str, Any]:
        assert type(model).__name__ == "LlamaForCausalLM" and not getattr(model, "is_loaded_in_4bit", False)
        trainer = made[-1]
        with monkeypatch.context() as patched:
            patched.setattr(trainer, "model", model)
            saved.append(mean_loss(trainer, "held_out"))
        return {"lm_eval": {}}

    made: list[Any] = []
    make = training._make_trainer

    def keep(*given: Any) -> Any:
        found = make(*given)
        made.append(found[0])
        return found

    monkeypatch.setattr(training, "_make_trainer", keep)
    monkeypatch.setattr(harness, "evaluate", evaluate)
    suite = make_tiny([method], lm_eval=["any"])
    measured = run_job(suite, Job(method, "final", 0, 1e-2, 3), lambda step: None)
    assert "lm_eval_error" not in measured, measured["lm_eval_error"]
    assert saved == [pytest.approx(measured["loss"]["held_out"][-1], rel=1e-4)]


def test_a_merged_model_ends_its_answers_where_the_base_does(tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, _ = load_model(str(tiny_model), torch.bfloat16)
    model.generation_config.eos_token_id = [1, 2]
    prepared = get_method("qlora").prepare(model, TrainConfig(model=str(tiny_model)))
    assert prepared.merged is not None
    merged: Any = prepared.merged()
    assert merged.generation_config.eos_token_id == [1, 2] and merged.dtype == torch.bfloat16


@needs_harness
@pytest.mark.parametrize("method", ["qlora", "qlora-4bit"])
def test_the_harness_loads_what_was_merged(
    method: str, tasks: Path, make_tiny: Callable[..., Suite], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    suite = make_tiny([method], lm_eval=["own_task"], lm_eval_tasks=tasks)
    measured = run_job(suite, Job(method, "final", 0, 1e-2, 1), lambda step: None)
    assert measured["lm_eval"]["own_task"]["acc"] in (0.0, 0.5, 1.0)


@pytest.mark.parametrize("error", [ConfigError("a task is gone"), RuntimeError("broken\ntrace")])
def test_a_run_is_kept_where_the_harness_fails_after_it(
    error: Exception, make_tiny: Callable[..., Suite], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "evaluate", Mock(side_effect=error))
    suite = make_tiny(["lisa"], lm_eval=["any"], learning_rates=[1e-2], seeds=[0])
    measured = run_job(suite, Job("lisa", "final", 0, 1e-2, 1), lambda step: None)
    assert (
        measured["lm_eval_error"] in ("a task is gone", "RuntimeError: broken") and "lm_eval" not in measured
    )
    line = {"key": "final/lisa/seed-0", "method": "lisa", "stage": "final", "seed": 0, "learning_rate": 1e-2}
    (row,) = analyze(suite, [{**line, **measured}]).rows
    assert row.runs and not row.failed and row.errors == (("final/lisa/seed-0", measured["lm_eval_error"]),)


def test_scores_are_in_the_page_and_in_its_tables(
    make_tiny: Callable[..., Suite], made_up: Callable[..., Any]
) -> None:
    suite = make_tiny(["full", "lisa"], lm_eval=["any"], learning_rates=[1e-2], seeds=[0, 1])
    lines = [
        {
            **{"method": entry.name, "stage": "final", "seed": job.seed, "learning_rate": 1e-2},
            **made_up(job, 1.0),
            "lm_eval": {"own": {"acc|x,strict": 0.25 + 0.5 * job.seed, "acc_stderr,strict": 0.1, "ppl": 2.0}},
            "lm_eval_higher_is_better": {"own": {"acc|x": True}},
        }
        for entry in suite.entries
        for job in suite.final_jobs(entry, 1e-2)
    ]
    del lines[1]["lm_eval"]["own"]["ppl"]  # of one seed alone: of no use as a mean
    analysis = analyze(suite, lines)
    shown = sections.harness(analysis)
    assert shown["columns"] == ["own: acc|x,strict (higher is better)", "own: ppl"]
    assert shown["rows"] == [["full", "0.5000 ± 3.1766", "–"], ["lisa", "0.5000 ± 3.1766", "2.0000 ± 0.0000"]]
    numbers = plain_words.table(analysis)
    assert [row["lm_eval own acc|x,strict"] for row in numbers] == [0.5, 0.5]
    assert [row["lm_eval own ppl"] for row in numbers] == [None, 2.0]


@needs_harness
def test_a_task_that_is_unknown_or_has_no_data_is_one_sentence(
    tasks: Path, make_tiny: Callable[..., Suite]
) -> None:
    with pytest.raises(ConfigError, match="Unknown task of lm-evaluation-harness 'own_tusk'") as unknown:
        harness.load_tasks(["own_tusk"], tasks)
    assert len(str(unknown.value)) < 250, "the harness has thousands"
    (tasks / "own.jsonl").unlink()
    suite = make_tiny(["lisa"], lm_eval=["own_task"], lm_eval_tasks=tasks)
    with pytest.raises(ConfigError, match="data of own_task can't be had here .*local files"):
        suite.check_data()
    with pytest.raises(ConfigError, match="lm_eval_tasks must be a folder of task files"):
        harness.load_tasks(["own_task"], tasks / "none")


def write(tasks: Path, name: str, **keys: Any) -> None:
    own = yaml.safe_load((tasks / "own.yaml").read_text())
    (tasks / f"{name}.yaml").write_text(yaml.safe_dump({**own, "task": name, **keys}))


@needs_harness
def test_equal_models_have_equal_scores(
    tasks: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The examples that are shown are drawn by the seed of the harness's own command."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tasks / "own.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} {n % 7}?", "right": n % 2}) + "\n" for n in range(30)))
    write(tasks, "shown", num_fewshot=3, fewshot_split="train", metric_list=[{"metric": "brier_score"}])
    model, tokenizer = load_model(str(tiny_model))
    found = [harness.evaluate(model, tokenizer, ["shown"], tasks, limit=None) for _ in range(2)]
    assert found[0] == found[1] and found[0]["lm_eval"]["shown"]
    assert found[0]["lm_eval_higher_is_better"]["shown"] == {"brier_score": False}
    shown = [
        [instance.args for instance in task.instances]
        for task in (harness.load_tasks(["shown"], tasks)["tasks"]["shown"] for _ in range(2))
    ]
    assert shown[0] == shown[1]


@needs_harness
def test_groups_in_groups_are_scored(
    tasks: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tasks, "other_task")
    for name, members in (("inner", ["own_task", "other_task"]), ("outer", ["inner"])):
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": members}))
    model, tokenizer = load_model(str(tiny_model))
    scores = harness.evaluate(model, tokenizer, ["outer"], tasks, limit=None)["lm_eval"]
    assert {"own_task", "other_task"} <= scores.keys()


@needs_harness
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"unsafe_code": True}, "runs code that a model has written"),
        ({"doc_to_text": "{{nope.x}}"}, "bad can't be used .*see their files"),
        ({"num_fewshot": 9, "fewshot_split": "train"}, "'bad' can't be asked .*see its file"),
        ({"metric_list": [{"metric": "no_such_metric"}]}, "bad can't be used .*see their files"),
        (
            {
                **{"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{right}}"},
                **{
                    "generation_kwargs": {"until": ["."], "max_gen_toks": 9999},
                    "metric_list": [{"metric": "exact_match"}],
                },
            },
            r"answers must be shorter than the \d+ tokens that the model reads, but the task 'bad' .* to 9999",
        ),
    ],
)
def test_a_task_that_can_not_be_asked_is_refused_before_anything_trains(
    keys: dict[str, Any], message: str, tasks: Path, make_tiny: Callable[..., Suite]
) -> None:
    write(tasks, "bad", **keys)
    with pytest.raises(ConfigError, match=message):
        make_tiny(["lisa"], lm_eval=["bad"], lm_eval_tasks=tasks).check_data()


def test_what_python_compiles_of_a_task_is_none_of_its_files(
    tasks: Path, make_tiny: Callable[..., Suite]
) -> None:
    suite = make_tiny(["lisa"], lm_eval=["own_task"], lm_eval_tasks=tasks)
    before = fingerprint(suite, suite.entries[0])
    (tasks / "__pycache__").mkdir()
    (tasks / "__pycache__" / "utils.cpython-311.pyc").write_bytes(b"compiled")
    assert fingerprint(suite, suite.entries[0]) == before
    (tasks / "_base.yaml").write_text("tag: x\n")
    assert fingerprint(suite, suite.entries[0]) != before


def test_data_that_a_task_names_is_among_its_files(
    tasks: Path, make_tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere.jsonl"
    elsewhere.write_text('{"text": "a?", "right": 0}\n')
    (tasks / "other.yaml").write_text(
        f"task: other\nprocess_docs: !function utils.pick\ndataset_kwargs: {{data_files: {{train: [{elsewhere}]}}}}\n"
        f"doc_to_text: {'x' * 5000}\n"
    )
    for number, text in enumerate(("{", "metadata: {date: 2024-02-30}", "dataset_kwargs: &a [*a]", "- a")):
        (tasks / f"odd-{number}.yaml").write_text(text)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "part.jsonl").write_text("1\n")
    (tasks / "of_folder.yaml").write_text(f"dataset_path: {folder}\n")
    (tmp_path / "some-1.csv").write_text("1\n")
    (tasks / "of_pattern.yaml").write_text(f"dataset_kwargs: {{data_files: '{tmp_path}/some-*.csv'}}\n")
    suite = make_tiny(["lisa"], lm_eval=["other"], lm_eval_tasks=tasks)
    found = [fingerprint(suite, suite.entries[0])]
    for data in (elsewhere, folder / "part.jsonl", tmp_path / "some-1.csv"):
        data.write_text("another\n")
        found.append(fingerprint(suite, suite.entries[0]))
    assert len(set(found)) == 4


def test_keys_of_the_harness_without_a_task_are_refused(tasks: Path, make_tiny: Callable[..., Suite]) -> None:
    for keys in ({"lm_eval_tasks": tasks}, {"lm_eval_limit": 3}):
        with pytest.raises(ConfigError, match="but none is named: give --lm-eval"):
            make_tiny(["lisa"], **keys).check_data()


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
        "ppl": float("inf"),
    }
    assert harness._numbers(found) == {"acc": 0.5, "em,strict": 1.0}
