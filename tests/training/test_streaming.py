"""Data that is read while it trains."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from layersample import ConfigError
from layersample.config import make_config
from layersample.training.arguments import training_arguments
from layersample.training.data import load_data, problem_of
from layersample.training.finetune import finetune
from layersample.training.streaming import StreamedRows, stream_split, tokenize_stream
from layersample.training.trainer import CheckedTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def tokens_of(rows: Any) -> list[list[int]]:
    return [row["input_ids"] for row in rows]


def test_held_out_problems_never_train_and_follow_the_seed(tmp_path: Path, sums: Path) -> None:
    rows = [json.loads(line) for line in sums.read_text().splitlines()]
    source = write(tmp_path / "twice.jsonl", rows + rows)
    chosen = []
    for seed in (0, 0, 1):
        train, held_out = stream_split(source, None, eval_size=4, seed=seed)
        problems = {problem_of(row) for row in held_out}
        assert len(held_out) == len(problems) == 4
        trained = [problem_of(row) for row in train]
        assert len(trained) == 2 * 36 and not problems & set(trained)
        chosen.append(problems)
    assert chosen[0] == chosen[1] != chosen[2]
    train, held_out = stream_split(source, str(sums), eval_size=3, seed=0)
    assert len(held_out) == 3 and len(list(train)) == 2 * 37
    assert "prompt and completion" in train.description and "read while it trains" in train.description


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a"}, {"text": "a"}], {}, "at least 2 different problems .* there is 1"),
        ([{"text": "a"}, {"prompt": "a", "completion": "b"}], {}, "line 2: all examples must have the same"),
        ([{"question": "a"}], {}, "line 1: an example must have"),
    ],
)
def test_what_the_first_rows_show(
    tmp_path: Path, rows: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        stream_split(write(tmp_path / "a.jsonl", rows), None, eval_size=2, seed=0, **options)


def test_tokens_and_labels_are_those_of_data_that_is_loaded(
    tiny_model: Path, sums: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    arguments = training_arguments(make_config(("test", {"max_length": 8})), tmp_path)
    streamed = tokenize_stream(StreamedRows(str(sums), {}), tokenizer, arguments, "answers", seed=3)
    first, again = (list(islice(streamed, 80)) for _ in range(2))
    assert first == again, "the same each time"
    whole: Dataset = CheckedTrainer.prepare(load_data(str(sums)), tokenizer, "answers", 8)
    expected = {tuple(row["input_ids"]): row["labels"] for row in whole}
    for one_pass in (first[:40], first[40:]):
        assert {tuple(row["input_ids"]): row["labels"] for row in one_pass} == expected, "each once"
        assert tokens_of(one_pass) != tokens_of(whole), "in another order"
    assert first[:40] != first[40:], "each time"


def test_what_is_cut_is_counted_once_as_it_is_read(
    options: dict[str, Any], sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layersample.training.streaming._CHUNK", 8)
    monkeypatch.setattr("layersample.training.streaming._WINDOW_OF_ORDER", 4)
    rows = [json.loads(line) for line in sums.read_text().splitlines()]
    long = [{**row, "completion": "1" * (20 if i % 3 else 2)} for i, row in enumerate(rows)]
    source = write(tmp_path / "long.jsonl", long)
    given = {**options, "data": source, "eval_data": str(sums), "eval_size": 2, "batch_size": 2, "steps": 4}
    said: list[str] = []
    # In another process, which shares the count.
    trainer = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}
    counts = finetune(make_config(("test", {**given, "trainer": trainer})), report=said.append)["examples"]
    read, cut = counts["training_read"], counts["training_cut_to_max_length"]
    assert 12 <= read < 38 and read % 8 == 0, "as far as it has read"
    assert cut == sum(bool(i % 3) for i in range(2, 2 + read)), "behind the two held-out problems"
    assert (
        f"Of {read} training examples that were read, {cut} are longer than 16 tokens and were cut." in said
    )


def test_no_end_and_nothing_left(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    arguments = training_arguments(make_config(("test", {"max_length": 8})), tmp_path)
    source = write(tmp_path / "a.jsonl", [{"prompt": "x" * 40, "completion": "y"}] * 3)
    with pytest.raises(ConfigError, match="no training example is left"):
        next(iter(tokenize_stream(StreamedRows(source, {}), tokenizer, arguments, "answers", seed=0)))


@pytest.fixture
def options(short_run: dict[str, Any]) -> dict[str, Any]:
    return {**short_run, "batch_size": 8, "stream": True}


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_streamed_run_goes_on_where_it_was(options: dict[str, Any], tmp_path: Path) -> None:
    """Also past the end of the data: 48 examples are taken of 36."""
    said: list[str] = []
    summary = finetune(make_config(("test", {**options, "save_steps": 5})), report=said.append)
    assert summary["held_out_loss"]["after"] < summary["held_out_loss"]["before"]
    assert summary["examples"]["training"] is None and summary["examples"]["held_out"] == 4
    assert summary["examples"]["training_read"] == 36, "of one pass, though it is a second one already"
    assert any("read while it trains. The held-out loss is measured on 4" in sentence for sentence in said)
    run, part = tmp_path / "run", tmp_path / "part"
    shutil.copytree(run, part)
    shutil.rmtree(part / "checkpoints" / "checkpoint-6", ignore_errors=True)
    finetune(make_config(("test", {**options, "save_steps": 5, "output": str(part), "resume": True})))
    assert losses(part) == losses(run)


def test_a_faulty_row_far_behind_ends_the_run_with_its_line(
    options: dict[str, Any], sums: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in sums.read_text().splitlines()] * 4
    source = write(tmp_path / "faulty.jsonl", [*rows, {"prompt": "1+1="}])
    with pytest.raises(ConfigError, match="faulty.jsonl, line 161: an example must have"):
        finetune(make_config(("test", {**options, "data": source})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 1}, "stream reads data whose end isn't known: give steps"),
        ({"trainer": {"packing": True}}, "packing puts examples together before training begins"),
    ],
)
def test_what_does_not_go_with_a_stream(
    options: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune(make_config(("test", {**options, **change})))
