"""What of a conversation is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from layersample import ConfigError
from layersample.config import make_config
from layersample.training.answers import (
    IGNORED,
    give_template,
    mark_answers,
    show_learned,
    template_columns,
)
from layersample.training.data import load_data
from layersample.training.finetune import finetune
from layersample.training.trainer import CheckedTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated", "ignore::UserWarning")

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "22"},
]
# As Qwen 3's: what was thought is shown in the last answer alone.
FORGETS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' and loop.last %}{{ 'hmm ' }}"
    "{% endif %}{{ m['content'] }}{{ '</>' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# As Gemma's: no system, and roles take turns.
STRICT = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m['content'] }}{% endfor %}"


def learned(tokenizer: Any, row: dict[str, Any]) -> tuple[list[str], int]:
    marked = mark_answers(row, tokenizer)
    assert all(
        label in (IGNORED, token) for token, label in zip(marked["input_ids"], marked["labels"], strict=True)
    )
    pieces = show_learned(tokenizer, marked["input_ids"], marked["labels"])
    return [text for text, yes in pieces if yes], marked["lost"]


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def test_every_answer_is_learned_and_nothing_else(tokenizer: Any) -> None:
    assert learned(tokenizer, {"messages": CHAT}) == (["1\n", "22\n"], 0)
    weighted = [{**m, "weight": 0} if m["content"] == "1" else m for m in CHAT]
    assert learned(tokenizer, {"messages": weighted}) == (["22\n"], 0)


def test_the_tokens_are_the_template_s(tokenizer: Any) -> None:
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert mark_answers({"messages": CHAT}, tokenizer)["input_ids"] == whole


def test_an_answer_that_changes_once_others_follow(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETS
    assert learned(tokenizer, {"messages": CHAT}) == (["hmm 22</>"], 1)


def test_a_template_that_refuses(tokenizer: Any) -> None:
    tokenizer.chat_template = STRICT
    with pytest.raises(
        ConfigError, match="refuses one of system, user, assistant, user, assistant: no system"
    ):
        mark_answers({"messages": CHAT}, tokenizer)


def test_the_template_of_a_base_model(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    assert give_template(tokenizer) and not give_template(tokenizer)
    assert learned(tokenizer, {"messages": CHAT}) == ([" 1</s>", " 22</s>"], 0)


def test_tools_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{{ tools | length }} tools{{ mood }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    row = {"messages": CHAT, "tools": json.dumps([{"type": "function", "function": {"name": "f"}}])}
    ids = mark_answers({**row, "chat_template_kwargs": {"mood": ", glad"}}, tokenizer)["input_ids"]
    assert tokenizer.decode(ids).startswith("1 tools, glad")


@pytest.mark.parametrize(
    ("row", "answers", "everything"),
    [
        ({"messages": CHAT}, 5, 65),
        ({"prompt": CHAT[1:2], "completion": CHAT[2:3]}, 2, 24),
        ({"prompt": "1+1=", "completion": "2"}, 2, 6),
        ({"text": "abc"}, 4, 4),
    ],
)
def test_what_each_format_learns(
    tokenizer: Any, tmp_path: Path, row: Any, answers: int, everything: int
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    for train_on, count in (("answers", answers), ("all", everything)):
        data = load_data(str(tmp_path / "a.jsonl"))
        prepared = CheckedTrainer.prepare(data, tokenizer, train_on, None)  # type: ignore[arg-type]
        assert sum(label != IGNORED for label in prepared[0]["labels"]) == count, train_on


def test_a_run_says_what_it_learns(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{**CHAT[1], "content": f"{i}?"}, CHAT[2]]} for i in range(12)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": str(tiny_model), "data": str(tmp_path / "a.jsonl"), "output": tmp_path / "run", "steps": 2, "max_length": 64, "eval_size": 3}  # fmt: skip
    said: list[str] = []
    finetune(make_config(("test", options)), report=said.append)
    text = "\n".join(said)
    assert (
        "Recognized as chat (messages): 12 examples. 9 train; the held-out loss is measured on 3 that were held out"
        in text
    )
    assert "what is learned in «»: 'user: 1?\\nassistant: «1\\n»'" in text


def test_what_a_template_reads_beside_the_messages(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert template_columns(tokenizer) == frozenset()
    tokenizer.chat_template = (
        "{{ bos_token }}{% if enable_thinking %}x{% endif %}{% for d in documents %}{{ d }}{% endfor %}"
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}{% set a = 1 %}{{ a }}"
    )
    assert template_columns(tokenizer) == {"enable_thinking", "documents"}
    tokenizer.chat_template = "{% if %}"
    assert template_columns(tokenizer) == frozenset()
