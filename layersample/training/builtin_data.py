"""The data that comes by name: problems to train on, headlines to judge, and a text to see what is forgotten."""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from layersample.errors import ConfigError
from layersample.files import cache_folder, write_text
from layersample.training.wheels import fetch_wheel, make_cache_folder

Row = Mapping[str, Any]

EVALS = ("evals==3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")
_HEADLINES = "evals/registry/data/sarcasm/samples.jsonl"
_TEXT_LENGTH = 800  # characters of a piece of the book: about 200 tokens


def gsm_symbolic() -> list[Row]:
    """Grade-school problems with worked solutions that end in ``#### answer``."""
    create_dataset = _reasoning_gym("gsm_symbolic").create_dataset
    problems = create_dataset("gsm_symbolic", size=2500, seed=42)
    return [
        {"prompt": problem["question"] + "\n", "completion": problem["metadata"]["answer_cot"]}
        for problem in problems
    ]


def sarcasm() -> list[Row]:
    """News headlines, with the answer whether they are meant seriously; fetched once (46 MB).

    Raises:
        ConfigError: If they aren't in the cache and can't be fetched.
    """
    path = cache_folder() / "data" / "sarcasm.jsonl"
    if not path.is_file():
        with tempfile.TemporaryDirectory(prefix=".sarcasm-", dir=make_cache_folder("data")) as scratch:
            wheel = fetch_wheel(*EVALS, Path(scratch), instead="choose other data with --data")
            with zipfile.ZipFile(wheel) as archive:
                write_text(path, archive.read(_HEADLINES).decode("utf-8"))
    rows: dict[str, Row] = {}  # by headline: some come twice
    for line in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        prompt = f"Headline: {sample['input'][-1]['content']}\nIs it sarcastic? Answer:"
        rows[prompt] = {"prompt": prompt, "completion": " yes" if sample["ideal"] == "1" else " no"}
    return list(rows.values())


def book() -> list[Row]:
    """A short novel of 1889 in English, in the public domain, in pieces of about 200 tokens."""
    text = _reasoning_gym("book").data.read_data_file("in_the_year_2889.txt")
    # Between the lines of the publisher and the redactor.
    body = re.split(r"echo Verne.s\nideas\.\]|End of Project", text)[1]
    pieces: list[Row] = []
    piece = ""
    for paragraph in re.split(r"\n\s*\n", body):
        piece += " ".join(paragraph.split()) + "\n"
        if len(piece) >= _TEXT_LENGTH:
            pieces.append({"text": piece.strip()})
            piece = ""
    return pieces


def _reasoning_gym(name: str) -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.data
    except ImportError as error:
        raise ConfigError(
            f'The data "{name}" needs the demo extra: pip install "layersample[demo]".'
        ) from error
    return reasoning_gym


BUILTIN: dict[str, Callable[[], list[Row]]] = {"gsm_symbolic": gsm_symbolic, "sarcasm": sarcasm, "book": book}
