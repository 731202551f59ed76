"""The formats that people have: recognized by their columns, and brought into TRL's."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from layersample.errors import ConfigError, short, text_fault

Row = Mapping[str, Any]
Message = dict[str, Any]

# Of a conversation, beside its messages: what chat templates read.
BESIDE = ("tools", "chat_template_kwargs")

_ROLES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "observation": "tool",
    "function": "tool", "function_response": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        name: What it is called.
        columns: The columns that make it this format.
        convert: Gives a row in TRL's format; it raises ``ValueError`` with what is wrong.
        also: Columns that it reads where they are there.
    """

    name: str
    columns: tuple[str, ...]
    convert: Callable[[Row], Row]
    also: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """Its name and columns, for messages."""
        return f"{self.name} ({', '.join(self.columns)})"

    def unused(self, row: Row, keep: Collection[str]) -> list[str]:
        """Columns of a row that nothing reads.

        Args:
            row: A row of this format.
            keep: What the chat template reads.
        """
        is_chat = not isinstance(self.convert(row).get("prompt", []), str) and "text" not in self.columns
        read = {*self.columns, *self.also, *((*BESIDE, *keep) if is_chat else ())}
        return [name for name in row if name not in read]


def recognize(row: Any, place: str) -> Format:
    """The format of a row.

    Raises:
        ConfigError: If it is none that is known; it shows the columns, and the formats.
    """
    known = "; ".join(f.sentence for f in FORMATS)
    if not isinstance(row, Mapping):
        raise ConfigError(f"{place}: an example must be one of {known}, but it is a {type(row).__name__}.")
    # A file of many columns says which are used by leaving the others empty.
    for format_ in FORMATS:
        if all(row.get(name) is not None for name in format_.columns):
            return format_
    for format_ in FORMATS:
        if all(name in row for name in format_.columns):
            return format_
    raise ConfigError(
        f"{place}: an example must have the columns of one of these formats: {known}; but it has "
        f"{', '.join(map(repr, row)) or 'nothing'}. Give columns of other names by --columns, as "
        "prompt=question,completion=answer."
    )


def convert(row: Row, format_: Format, place: str, keep: Collection[str] = ()) -> Row:
    """A row in TRL's format, with what a chat template reads; other columns are left out.

    Args:
        row: As it was read, its columns with the names that formats know.
        format_: Its format.
        place: For messages.
        keep: Names that the model's chat template reads; columns of these names are given to it.

    Raises:
        ConfigError: If a column holds something else than the format wants; it names the place.
    """
    try:
        converted = dict(format_.convert(row))
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error
    if "messages" in converted or isinstance(converted.get("prompt"), list):
        for name in BESIDE:
            if row.get(name) is not None:
                converted[name] = row[name] if isinstance(row[name], str) else json.dumps(row[name])
        read = {*format_.columns, *format_.also, *BESIDE}
        if given := {name: row[name] for name in keep if name not in read and row.get(name) is not None}:
            own = json.loads(converted.get("chat_template_kwargs", "{}"))
            converted["chat_template_kwargs"] = json.dumps({**given, **own})
    for name, value in converted.items():
        if _fault(value):
            raise ConfigError(f"{place}: {name!r} must be plain text, but it holds {_fault(value)}.")
    return converted


def rename(row: Any, columns: Mapping[str, str], place: str) -> Any:
    """A row whose columns have the names that formats know.

    Args:
        row: As it was read.
        columns: Of each name that formats know, the one in the data.
        place: For messages.

    Raises:
        ConfigError: If a column isn't there.
    """
    if not columns or not isinstance(row, Mapping):
        return row
    for ours, theirs in columns.items():
        if theirs not in row:
            has = ", ".join(map(repr, row))
            raise ConfigError(
                f"{place}: columns: {ours}={theirs} must name a column of the data, which has {has}."
            )
    return {
        **{name: value for name, value in row.items() if name not in {*columns, *columns.values()}},
        **{ours: row[theirs] for ours, theirs in columns.items()},
    }


def _prompt_completion(row: Row) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    lists = [isinstance(value, list) for value in (prompt, completion)]
    if all(lists):
        return {"prompt": _messages(row, "prompt"), "completion": _messages(row, "completion")}
    if any(lists):
        raise ValueError("it mixes text and messages.")
    return {"prompt": _text(row, "prompt"), "completion": _text(row, "completion")}


def _chat(row: Row) -> Row:
    return {"messages": _with_system(row, _messages(row, "messages"))}


def _sharegpt(row: Row) -> Row:
    return {"messages": _with_system(row, _messages(row, "conversations"))}


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _alpaca(row: Row) -> Row:
    question = _text(row, "instruction")
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise ValueError(f"'input' must be text, but is {short(extra)}.")
    if extra and extra.strip():
        question = f"{question}\n\n{extra}"
    history = row.get("history") or []
    turns = [pair for pair in history if isinstance(pair, list | tuple) and len(pair) == 2]
    if len(turns) < len(history):
        raise ValueError(f"'history' must be pairs of question and answer, but is {short(history)}.")
    prompt: list[Message] = []
    for asked, answered in turns:
        prompt += [{"role": "user", "content": str(asked)}, {"role": "assistant", "content": str(answered)}]
    prompt.append({"role": "user", "content": question})
    answer = [{"role": "assistant", "content": _text(row, "output")}]
    return {"prompt": _with_system(row, prompt), "completion": answer}


def _text2text(row: Row) -> Row:
    return {"prompt": _text(row, "input"), "completion": _text(row, "output")}


def _plain(row: Row) -> Row:
    return {"text": _text(row, "text")}


FORMATS = (
    Format("chat", ("messages",), _chat, ("system",)),
    Format("ShareGPT", ("conversations",), _sharegpt, ("system",)),
    Format("prompt and completion", ("prompt", "completion"), _prompt_completion),
    Format("Alpaca", ("instruction", "output"), _alpaca, ("input", "history", "system")),
    Format("text2text", ("input", "output"), _text2text),
    Format("plain text", ("text",), _plain),
)


def _text(row: Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be text, but {name!r} is {short(value)}.")
    if not value.strip():
        raise ValueError(f"{name!r} must not be empty.")
    return value


def _messages(row: Row, name: str) -> list[Message]:
    value = row[name]
    if isinstance(value, str):  # a column of CSV or Parquet
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"{name!r} must be a list of messages, but {name!r} is {short(value)}."
            ) from error
    if not isinstance(value, list):
        raise ValueError(f"{name!r} must be text or a list of messages, but {name!r} is {short(value)}.")
    if not value:
        raise ValueError(f"{name!r} must not be empty.")
    return [_message(message, f"message {number} of {name!r}") for number, message in enumerate(value, 1)]


def _message(message: Any, what: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{what} must have a role and content, but is {short(message)}.")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or not role:
        raise ValueError(f"{what} must have a role, but is {short(dict(message))}.")
    kept = {
        key: part
        for key, part in message.items()
        if part is not None and key not in ("role", "from", "content", "value")
    }
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = [_call(call, what) for call in calls]
    content = _content(message.get("content", message.get("value")), what, may_be_empty=bool(kept))
    return {"role": _ROLES.get(role, role), "content": content, **kept}


def _content(content: Any, what: str, *, may_be_empty: bool) -> str:
    """The text of a message; nothing where it calls tools, and parts of text are put together."""
    if content is None and may_be_empty:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        texts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
            text = part.get("text") if isinstance(part, Mapping) else part
            if kind != "text" or not isinstance(text, str):
                raise ValueError(f"the parts of {what} must be text, but one is {short(part)}.")
            texts.append(text)
        return "".join(texts)
    raise ValueError(f"{what} must have content that is text, but its content is {short(content)}.")


def _call(call: Any, what: str) -> Any:
    """A tool call whose arguments are a mapping, as chat templates want them; OpenAI's are JSON as text."""
    if not isinstance(call, Mapping):
        raise ValueError(f"the tool calls of {what} must be mappings, but one is {short(call)}.")
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError as error:
        raise ValueError(f"the arguments of a tool call in {what} must be JSON, but: {error}.") from error
    return {**call, "function": {**function, "arguments": arguments}}


def _fault(value: Any) -> str | None:
    """What keeps text in a value from being tokenized; a NUL character doesn't."""
    if isinstance(value, str):
        return text_fault(value.replace("\0", ""))
    if isinstance(value, Mapping):
        value = list(value.values())
    parts = value if isinstance(value, list) else []
    return next((fault for part in parts if (fault := _fault(part))), None)
