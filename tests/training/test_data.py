from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from layersample import ConfigError
from layersample.training.data import load_data, load_split


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


CHAT = {"prompt": [{"role": "user", "content": "1+1"}], "completion": [{"role": "assistant", "content": "2"}]}
MESSAGES = {"messages": [*CHAT["prompt"], *CHAT["completion"]]}
PLAIN = {"prompt": "1+1=", "completion": "2", "id": 7}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (PLAIN, ["prompt", "completion"]),
        (CHAT, ["prompt", "completion"]),
        (MESSAGES, ["messages"]),
        ({"text": "a"}, ["text"]),
    ],
)
def test_reads_each_of_trl_s_formats(tmp_path: Path, row: Any, columns: list[str]) -> None:
    for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        if path.suffix == ".jsonl":
            write_jsonl(path, [row])
        else:
            Dataset.from_list([row]).to_parquet(path)
        data = load_data(str(path))
        assert data.column_names == columns
        assert data[0] == {name: row[name] for name in columns}


def test_reads_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"1+1=",2\n"say ""hi"",\nplease",hi\n', encoding="utf-8")
    assert load_data(str(path))[1] == {"prompt": 'say "hi",\nplease', "completion": "hi"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "must hold at least one example, but is empty"),
        (
            "a.jsonl",
            '{"prompt": "a", "completion": "b"}\n{"prompt": \n',
            "a.jsonl, line 2: must be one JSON object",
        ),
        ("a.jsonl", '{"question": "a"}\n', "line 1: an example must have .* but it has 'question'"),
        ("a.jsonl", "[1]\n", "line 1: .* but it is a list"),
        ("a.jsonl", '{"prompt": "a", "completion": 3}\n', "line 1: .* but 'completion' is 3"),
        ("a.jsonl", '{"prompt": "a", "completion": " "}\n', "line 1: 'completion' must not be empty"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user"}]}\n',
            "line 1: message 1 of 'messages' must have content that is text",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "completion": [{"role": "x", "content": "y"}]}\n',
            "it mixes text and messages",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "completion": "b"}\n{"text": "c"}\n',
            "line 2: all examples must have the same",
        ),
        ("a.csv", "prompt,completion\na\n", "line 2: must have 2 fields, as the first line"),
        ("a.csv", "question,answer\na,b\n", "line 2: an example must have"),
        ("a.csv", 'prompt,completion\n"a,b\n', "a.csv, line .*: must be CSV"),
        ("a.parquet", "not parquet", "a.parquet: must be a Parquet file"),
        ("a.xlsx", "x", "must end in .jsonl, .json, .csv, .parquet, .txt .or one of them and .gz., but got"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_data(str(path))


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(b'prompt,completion\n{"text": "\xff"}')
        with pytest.raises(ConfigError, match="must be (UTF-8 text|CSV in UTF-8)|must be one JSON object"):
            load_data(str(tmp_path / name))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.jsonl", "must exist, but there is no file"),
        ("gsm_symbolc", "Unknown data 'gsm_symbolc'. Did you mean 'gsm_symbolic'"),
    ],
)
def test_a_missing_source_is_named(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_data(source)


def test_a_hub_id_is_loaded_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, split: str) -> Dataset:
        asked.append((name, split))
        return Dataset.from_list([PLAIN])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_data("someone/something")) == 1
    assert asked == [("someone/something", "train")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: 1 / 0)
    with pytest.raises(
        ConfigError, match="someone/something: could not be loaded from the hub: division by zero"
    ):
        load_data("someone/something")


def test_split_is_by_problem(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i % 10}", "completion": f"{i}"} for i in range(40)]
    train, held_out = load_split(write_jsonl(tmp_path / "a.jsonl", rows), None, eval_size=4, seed=0)
    assert len(held_out) == 4 and len(set(held_out["prompt"])) == 4
    assert len(train) == 24
    assert not set(train["prompt"]) & set(held_out["prompt"])
    again = load_split(str(tmp_path / "a.jsonl"), None, eval_size=4, seed=0)[1]
    other = load_split(str(tmp_path / "a.jsonl"), None, eval_size=4, seed=1)[1]
    assert held_out["prompt"][:] == again["prompt"][:] != other["prompt"][:]


def test_held_out_file_is_taken_out_of_the_training_data(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "completion": "x"} for i in range(6)]
    train, held_out = load_split(
        write_jsonl(tmp_path / "a.jsonl", rows),
        write_jsonl(tmp_path / "b.jsonl", rows[:2]),
        eval_size=9,
        seed=0,
    )
    assert train["prompt"][:] == ["2", "3", "4", "5"]
    assert held_out["prompt"][:] == ["0", "1"]


def test_messages_without_an_answer_are_problems_of_their_own(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": str(number)}]} for number in range(4)]
    train, held_out = load_split(write_jsonl(tmp_path / "a.jsonl", rows), None, eval_size=1, seed=0)
    assert (len(train), len(held_out)) == (3, 1)


def test_too_little_to_split(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", [PLAIN, PLAIN])
    with pytest.raises(
        ConfigError, match="at least 2 different problems are needed to hold one out, but there is 1"
    ):
        load_split(one, None, eval_size=4, seed=0)
    with pytest.raises(ConfigError, match="no training example is left"):
        load_split(one, one, eval_size=4, seed=0)


def test_built_in_data_has_worked_solutions_and_no_test_problem_in_train() -> None:
    train, held_out = load_split("gsm_symbolic", None, eval_size=32, seed=0)
    assert len(held_out) == 32 and len(train) > 2400
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert all("#### " in completion for completion in held_out["completion"])


def test_columns_that_the_template_reads_are_given_to_it_and_the_others_are_named(tmp_path: Path) -> None:
    row = {**MESSAGES, "enable_thinking": False, "documents": ["d"], "id": 7, "tools": [{"name": "f"}]}
    source = write_jsonl(tmp_path / "a.jsonl", [row, {**row, "documents": None}])
    data = load_data(source, keep={"enable_thinking", "documents"})
    assert [each["chat_template_kwargs"] for each in data] == [
        {"enable_thinking": False, "documents": ["d"]},
        {"enable_thinking": False},
    ]
    assert json.loads(data[0]["tools"]) == [{"name": "f"}]
    assert data.info.description.endswith("2 examples. Not used: 'id'.")
    own = {**row, "chat_template_kwargs": {"enable_thinking": True}}
    [kept] = load_data(write_jsonl(tmp_path / "b.jsonl", [own]), keep={"enable_thinking"})
    assert kept["chat_template_kwargs"] == {"enable_thinking": True}, "what is said there comes first"
    plain = load_data(write_jsonl(tmp_path / "c.jsonl", [PLAIN]), keep={"id"})
    assert plain.column_names == ["prompt", "completion"] and "Not used: 'id'" in plain.info.description
    alpaca = {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": []}
    assert "Not used" not in load_data(write_jsonl(tmp_path / "d.jsonl", [alpaca])).info.description
