"""The formats that people have, brought into TRL's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layersample import ConfigError
from layersample.training.data import load_data

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "integer"}}}}]


def load(tmp_path: Path, *rows: Any, **columns: str) -> Any:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_data(str(path), columns)


@pytest.mark.parametrize(
    ("row", "name", "converted"),
    [
        (
            {"prompt": "q", "completion": "a", "id": 7},
            "prompt and completion",
            {"prompt": "q", "completion": "a"},
        ),
        (
            {"instruction": "q", "input": "", "output": "a"},
            "Alpaca",
            {"prompt": [USER], "completion": [ANSWER]},
        ),
        (
            {"instruction": "q", "input": "more", "output": "a", "system": "s", "history": [["x", "y"]]},
            "Alpaca",
            {
                "prompt": [
                    SYSTEM,
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "content": "y"},
                    {"role": "user", "content": "q\n\nmore"},
                ],
                "completion": [ANSWER],
            },
        ),
        (
            {
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                "system": "s",
            },
            "ShareGPT",
            {"messages": [SYSTEM, USER, ANSWER]},
        ),
        ({"conversations": [USER, ANSWER]}, "ShareGPT", {"messages": [USER, ANSWER]}),
        ({"messages": [USER, ANSWER], "id": 1}, "chat", {"messages": [USER, ANSWER]}),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
            "chat",
            {"messages": [USER, ANSWER]},
        ),
        ({"input": "q", "output": "a"}, "text2text", {"prompt": "q", "completion": "a"}),
        ({"text": "a"}, "plain text", {"text": "a"}),
        ({"text": "a", "messages": [USER, ANSWER], "prompt": None}, "chat", {"messages": [USER, ANSWER]}),
    ],
)
def test_formats(tmp_path: Path, row: Any, name: str, converted: Any) -> None:
    data = load(tmp_path, row)
    assert data[0] == converted
    assert (
        data.info.description.startswith(f"Recognized as {name} (") and "1 examples." in data.info.description
    )


def test_tools_and_calls_come_back_as_they_were(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1, "y": null}'}}
    rows = [
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
                      {"role": "tool", "tool_call_id": "1", "content": "2"}, ANSWER], "tools": TOOLS},
        {"messages": [USER, ANSWER]},
    ]  # fmt: skip
    data = load(tmp_path, *rows)
    assert json.loads(data[0]["tools"]) == TOOLS and data[1]["tools"] is None
    asked, called, answered, said = data[0]["messages"]
    assert (asked, said) == (USER, ANSWER), "no key that another message has"
    assert called["content"] == "" and answered["tool_call_id"] == "1"
    assert called["tool_calls"][0]["function"]["arguments"] == {"x": 1, "y": None}
    assert data[1]["messages"] == [USER, ANSWER]


def test_columns_of_other_names(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "text": "something else"}
    assert load(tmp_path, row, prompt="question", completion="answer")[0] == {
        "prompt": "q",
        "completion": "a",
    }
    assert load(tmp_path, {"body": "x"}, text="body")[0] == {"text": "x"}
    with pytest.raises(
        ConfigError, match="line 1: columns: prompt=nope must name a column .* 'question', 'answer'"
    ):
        load(tmp_path, row, prompt="nope")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "q"}], "line 1: .* one of these formats: chat .*Alpaca.*; but it has 'question'. .*--columns"),
        ([{"text": "a"}, {"prompt": "a", "completion": "b"}], "line 2: .* same format as the first one, plain text"),
        ([{"prompt": "a", "completion": [ANSWER]}], "line 1: it mixes text and messages"),
        ([{"text": "\ud800"}], "line 1: 'text' must be plain text, but it holds half of a character"),
        ([{"messages": [{"role": "user", "content": "\udfff"}, ANSWER]}], "line 1: 'messages' .* half of a character"),
        ([{"messages": []}], "line 1: 'messages' must not be empty"),
        ([{"messages": ["hello"]}], "line 1: message 1 of 'messages' must have a role and content, but is 'hello'"),
        ([{"messages": [{"content": "x"}]}], "line 1: message 1 of 'messages' must have a role"),
        ([{"messages": [{"role": "user", "content": None}]}], "message 1 of 'messages' must have content that is text"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}],
            "the parts of message 1 of 'messages' must be text, but one is",
        ),
        (
            [{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": "{"}}]}]}],
            "the arguments of a tool call in message 1 of 'messages' must be JSON",
        ),
        ([{"instruction": "q", "input": 3, "output": "a"}], "line 1: 'input' must be text, but is 3"),
        ([{"instruction": "q", "output": "a", "history": ["x"]}], "'history' must be pairs"),
        ([{"messages": "hello"}], "line 1: 'messages' must be a list of messages"),
    ],
)  # fmt: skip
def test_what_is_no_example(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, *rows)
    assert "\n" not in str(caught.value)
