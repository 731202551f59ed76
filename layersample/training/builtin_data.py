"""The data that comes by name: problems to train on, headlines to judge, and a text to see what is forgotten."""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
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


def chain_sum() -> list[Row]:
    """Sums of two or three numbers below 100, to be answered with the number alone."""
    create_dataset = _reasoning_gym("chain_sum").create_dataset
    problems = create_dataset(
        "chain_sum", size=6000, seed=42, min_terms=2, max_terms=3, min_digits=1, max_digits=2
    )
    return _different(
        {"prompt": f"{problem['question']}\nAnswer:", "completion": f" {problem['answer']}."}
        for problem in problems
    )


def family_relationships() -> list[Row]:
    """Short texts about a family, and what one of its members is to another: one of twelve words."""
    create_dataset = _reasoning_gym("family_relationships").create_dataset
    problems = create_dataset("family_relationships", size=6000, seed=42)
    return _different(
        # With a full stop: "mother" begins "mother-in-law", and would always be the likelier of the two.
        {
            "prompt": f"{_without_request(problem['question'])}\nAnswer:",
            "completion": f" {problem['answer']}.",
        }
        for problem in problems
    )


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
    samples = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return _different(
        {
            "prompt": f"Headline: {sample['input'][-1]['content']}\nIs it sarcastic? Answer:",
            "completion": " yes" if sample["ideal"] == "1" else " no",
        }
        for sample in samples
    )


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


def _different(rows: Iterable[Row]) -> list[Row]:
    """Rows without those whose prompt comes twice: one of them may be trained on, and the other tested."""
    return list({row["prompt"]: row for row in rows}.values())


def _without_request(question: str) -> str:
    """A question without the sentence that asks for a single word."""
    return question.partition(" Respond only with")[0]


def _reasoning_gym(name: str) -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.data
    except ImportError as error:
        raise ConfigError(
            f'The data "{name}" needs the demo extra: pip install "layersample[demo]".'
        ) from error
    return reasoning_gym


BUILTIN: dict[str, Callable[[], list[Row]]] = {
    data.__name__: data for data in (gsm_symbolic, chain_sum, family_relationships, sarcasm, book)
}
