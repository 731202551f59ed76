from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest

from layersample import ConfigError
from layersample.files import cache_folder
from layersample.training import builtin_data
from layersample.training.data import load_data, load_split


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A wheel that pip would fetch; the list counts how often."""
    asked: list[str] = []

    def fetch(requirement: str, sha256: str, folder: Path, *, instead: str) -> Path:
        asked.append(requirement)
        samples = [
            {
                "input": [{"role": "system", "content": "1 or 0"}, {"role": "user", "content": text}],
                "ideal": ideal,
            }
            for text, ideal in (("man walks", "0"), ("area man walks", "1"), ("man walks", "0"))
        ]
        path = folder / "evals.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(builtin_data._HEADLINES, "\n".join(map(json.dumps, samples)))
        return path

    monkeypatch.setattr(builtin_data, "fetch_wheel", fetch)
    return asked


def test_headlines_are_fetched_once_and_kept(wheel: list[str]) -> None:
    rows = [dict(row) for row in load_data("sarcasm")]
    assert rows == [
        {"prompt": "Headline: man walks\nIs it sarcastic? Answer:", "completion": " no"},
        {"prompt": "Headline: area man walks\nIs it sarcastic? Answer:", "completion": " yes"},
    ]
    load_data("sarcasm")
    assert wheel == ["evals==3.0.1.post1"]
    assert [path.name for path in (cache_folder() / "data").iterdir()] == ["sarcasm.jsonl"]


def test_the_book_is_text_without_the_publishers_lines() -> None:
    rows = load_data("book")
    text = " ".join(rows["text"])
    assert len(rows) >= 24 and "Gutenberg" not in text and "Earth Chronicle" in text
    train, held_out = load_split("book", None, eval_size=4, seed=0)
    assert len(held_out) == 4 and len(train) == len(rows) - 4


@pytest.mark.parametrize("name", ["gsm_symbolic", "book"])
def test_a_missing_extra_is_named_with_its_pip_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        ConfigError, match=rf'"{name}" needs the demo extra: pip install "layersample\[demo\]"'
    ):
        load_data(name)
