"""Rows out of the files that people have."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from layersample import ConfigError
from layersample.training.readers import is_file_source, read_rows

ROWS = [{"prompt": f"{i}?", "completion": f"ä{i}"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)


def read(source: str | Path) -> list[Any]:
    return [row for _, row in read_rows(str(source))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", LINES),
        ("a.json", json.dumps({"type": "text2text", "instances": ROWS})),
        ("a.json", json.dumps({"data": ROWS}, indent=1)),
        ("a.csv", CSV),
        ("a.csv", CSV.replace("\n", "\r\n")),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
@pytest.mark.parametrize("compressed", [False, True], ids=["", "gz"])
def test_each_kind_of_file(tmp_path: Path, name: str, text: str, mark: str, compressed: bool) -> None:
    content = (mark + text).encode()
    path = tmp_path / (name + ".gz" if compressed else name)
    path.write_bytes(gzip.compress(content, mtime=0) if compressed else content)
    assert is_file_source(str(path)) and read(path) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_texts_that_are_long_or_hold_other_ends_of_lines(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"a{mark}b" * 50_000} for mark in ("\u2028", "\x85", "\x0b", "\x0c")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(["text", *(row["text"] for row in rows)] if name == "a.csv" else lines)
    (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    assert read(tmp_path / name) == rows


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    Dataset.from_list(ROWS).to_parquet(path)
    assert read(path) == ROWS
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    assert read(tmp_path / "a.parquet.gz") == ROWS
    whole = bytearray(path.read_bytes())
    whole[4:40] = b"\xff" * 36  # its first page
    path.write_bytes(whole)
    with pytest.raises(ConfigError, match="a.parquet.*: must be a Parquet file, but: "):
        read(path)


def test_plain_text_is_an_example_a_piece(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n  \nthree\n")
    places = list(read_rows(str(tmp_path / "a.txt")))
    assert [row["text"] for _, row in places] == ["one\ntwo", "three"]
    assert [place.rpartition(" ")[2] for place, _ in places] == ["1", "5"], "lines"


def test_several_files_and_a_folder(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv"):
        (tmp_path / name).write_text(LINES if name == "b.jsonl" else CSV)
    (tmp_path / "notes.md").write_text("x")
    assert read(tmp_path) == ROWS * 2
    assert read(f"{tmp_path / 'a.csv'}, {tmp_path / 'b.jsonl'}") == ROWS * 2
    (tmp_path / "x,y.jsonl").write_text(LINES)
    assert read(tmp_path / "x,y.jsonl") == ROWS, "a comma may be part of a name"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"a": 1}\n' + b"[" * 100_000,
            "line 2: must be one JSON object, but: maximum recursion",
        ),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1: must be one JSON object, but: Exceeds"),
        ("a.jsonl", b'{"a": "\xff"}', "must be UTF-8 text"),
        ("a.jsonl", b'{"a": 1, "b": 2, "a": 3}', "line 1: must be one JSON object, but: a comes twice"),
        ("a.json", b'[{"a": {"b": 2, "b": 3}}]', "must be one JSON object, but: b comes twice"),
        ("a.csv", b"a,b,a\n1,2,3\n", "line 1: each column must have a name of its own, but a comes twice"),
        (
            "a.json",
            b'{"train": [{"a": 1}], "test": [{"a": 2}]}',
            "one list of examples, but holds train, test: put",
        ),
        ("a.json", b"[" * 100_000, "must be one JSON object"),
        ("a.json", b'"text"', "must hold a list of examples, but holds a str"),
        ("a.json", b"", "must hold at least one example, but is empty"),
        ("a.jsonl.gz", b"not gzip", "must be UTF-8 text, but: Not a gzipped file"),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)[:-12], "must be UTF-8 text, but: "),
        ("a.txt", b"\n \n", "must hold at least one example, but is empty"),
        ("a.parquet", b"PAR1", "must be a Parquet file"),
    ],
)
def test_files_that_are_damaged(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}.*{message}") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_folders_without_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must hold files of .jsonl.* holds none"):
        read(tmp_path)
    assert not is_file_source("a/b") and not is_file_source("x" * 5000)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("rows", [[{"a": "]},["}, 3, [1, [2]], None], [12345678901, 2.5, "s"]])
def test_a_list_is_read_in_pieces(
    tmp_path: Path, rows: list[Any], indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layersample.training.readers._PIECE", 5)
    path = tmp_path / "a.json"
    path.write_text("\ufeff \n" + json.dumps(rows, indent=indent) + "\n ", encoding="utf-8")
    assert read(path) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1 2]", "after example 1: must be one JSON object, but: Expecting ','"),
        ("[1,", "after example 1"),
        ("[1,]", "after example 1"),
        ("[,1]", "after example 0"),
        ("[1", "after example 0"),
        ("[1] 2", "something follows its end"),
        ("[" + "9" * 5000 + "]", "Exceeds the limit"),
    ],
)
def test_lists_that_are_damaged(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=f"a.json.*{message}"):
        read(tmp_path / "a.json")
