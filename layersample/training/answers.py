"""What of a conversation is learned: the assistant's turns, found by rendering the conversation up to each of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase

from layersample.errors import ConfigError
from layersample.model_files import reason

IGNORED = -100  # a label that has no loss

# What transformers gives every template, and no column may replace.
_GIVEN = {
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "raise_exception",
    "strftime_now",
    "tools",
}

# Of a base model: roles as words, and the end of text behind each answer, so that it learns to stop.
DEFAULT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def is_conversation(features: Mapping[str, Any]) -> bool:
    """Whether a data set, by its features, is made of messages."""
    return "messages" in features or getattr(features.get("prompt"), "dtype", None) not in (None, "string")


def show_learned(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]
) -> list[tuple[str, bool]]:
    """The text of an example in pieces, each with whether it is learned.

    Args:
        tokenizer: The model's.
        ids: Tokens of an example.
        labels: A label for each.
    """
    return [
        (str(tokenizer.decode([token for token, _ in piece])), learned)
        for learned, piece in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    ]


def template_columns(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Names that a tokenizer's chat template reads: columns of these names are its to render, and never dropped."""
    own = tokenizer.chat_template
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    read: set[str] = set()
    for text in own.values() if isinstance(own, dict) else [own or ""]:
        # transformers' own tags around what an assistant says, which jinja doesn't know.
        plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
        with suppress(TemplateError):  # which rendering will tell
            read |= meta.find_undeclared_variables(environment.parse(plain))
    return frozenset(read - _GIVEN - set(tokenizer.special_tokens_map))


def give_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without a chat template a plain one; whether it had none."""
    if tokenizer.chat_template is not None:
        return False
    tokenizer.chat_template = DEFAULT_TEMPLATE
    return True


def mark_answers(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Tokens of a conversation, labelled where the assistant speaks.

    Chat templates rarely say which part of their text is an answer. But the text of a conversation up to an answer,
    with the header that asks for one, is where that answer begins; and the text with it is where it ends.

    Args:
        row: With ``messages``, and what a template reads beside them.
        tokenizer: With a chat template.

    Returns:
        ``input_ids`` and ``labels`` of equal length, and ``lost``: answers that this template renders differently
        once others follow, and which therefore can't be found in the whole.

    Raises:
        ConfigError: If the template refuses the conversation.
    """
    messages = row["messages"]
    text = render(tokenizer, row, messages)
    spans, lost = [], 0
    for number, message in enumerate(messages):
        # OpenAI's data mark by weight 0 what is read but not learned.
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        before = render(tokenizer, row, messages[:number], ask=True) if number else ""
        upto = text if number + 1 == len(messages) else render(tokenizer, row, messages[: number + 1])
        start, end = _shared(before, text), _shared(upto, text)
        if start < end and message["content"].strip() in text[start:end]:
            spans.append((start, end))
        else:
            lost += 1
    ids, offsets = _tokenize(tokenizer, text)
    learned = [any(start <= begin < end for start, end in spans) for begin in offsets]
    labels = [token if yes else IGNORED for token, yes in zip(ids, learned, strict=True)]
    return {"input_ids": ids, "labels": labels, "lost": lost}


def render(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], messages: Sequence[Any], *, ask: bool = False
) -> str:
    """The text of a conversation by a tokenizer's chat template.

    Args:
        tokenizer: With a chat template.
        row: What the template reads beside the messages.
        messages: The messages, or the first of them.
        ask: Whether to end with the header that asks for an answer.

    Raises:
        ConfigError: If the template refuses the conversation.
    """
    tools = row.get("tools")
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            tokenize=False,
            add_generation_prompt=ask,
            **(row.get("chat_template_kwargs") or {}),
        )
    except Exception as error:  # jinja's, or what the template itself raises
        roles = ", ".join(str(message["role"]) for message in messages)
        raise ConfigError(
            f"The model's chat template must render each conversation, but it refuses one of {roles}: {reason(error)}"
        ) from error
    return str(text)


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return len(os.path.commonprefix([one, other]))


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Tokens of a text, and at which character each begins."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [begin for begin, _ in encoded["offset_mapping"]]
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # Without offsets: as many characters as the tokens before decode to.
    return ids, [len(tokenizer.decode(ids[:number])) for number in range(len(ids))]
