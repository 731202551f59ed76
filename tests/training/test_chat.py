"""What a model answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layersample import ConfigError
from layersample.training.chat import Chat
from layersample.training.models import load_model


@pytest.fixture
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    return load_model(str(tiny_model))


def answer_of(model: Any, tokenizer: Any, prompt: str, tokens: int = 8) -> str:
    """The likeliest token, one after the other."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            if ids[0, -1] == model.generation_config.eos_token_id:
                break
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True)).strip()


def test_takes_the_likeliest_token_behind_the_template(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    chat = Chat(model, tokenizer, system="Be short.", max_tokens=8)
    first = chat.ask("1+1?")
    assert first == answer_of(model, tokenizer, "system: Be short.\nuser: 1+1?\nassistant: ")
    # The second question comes behind the first and its answer.
    before = f"system: Be short.\nuser: 1+1?\nassistant: {first}\n"
    assert chat.ask("2?") == answer_of(model, tokenizer, f"{before}user: 2?\nassistant: ")


def test_raw_gives_the_question_alone(loaded: tuple[Any, Any]) -> None:
    chat = Chat(*loaded, raw=True, max_tokens=8)
    assert [chat.ask("1+1="), chat.ask("1+1=")] == [answer_of(*loaded, "1+1=")] * 2


def test_tells_the_answer_piece_by_piece(loaded: tuple[Any, Any]) -> None:
    pieces: list[str] = []
    chat = Chat(*loaded, raw=True, max_tokens=8)
    assert chat.ask("1+1=", pieces.append) == "".join(pieces).strip()


def test_draws_are_seeded(loaded: tuple[Any, Any]) -> None:
    def ask(seed: int) -> str:
        return Chat(*loaded, raw=True, temperature=5.0, seed=seed, max_tokens=8).ask("1+1=")

    assert ask(0) == ask(0) != ask(1)


def test_a_tokenizer_without_a_template_gets_the_plain_one(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    tokenizer.chat_template = None
    assert Chat(model, tokenizer, max_tokens=8).ask("1?") == answer_of(
        model, tokenizer, "User: 1?\nAssistant:"
    )


def test_a_conversation_that_is_too_long_is_refused_and_left_as_it_was(loaded: tuple[Any, Any]) -> None:
    chat, twin = (Chat(*loaded, max_tokens=8) for _ in range(2))
    assert chat.ask("1?") == twin.ask("1?")
    with pytest.raises(ConfigError, match="must fit the model's 128 positions, but it has .* --max-tokens"):
        chat.ask("x" * 128)
    assert chat.ask("2?") == twin.ask("2?")
