"""Calibration batches from the start of a training set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layersample.errors import ConfigError
from layersample.lengths import positions_of
from layersample.training.answers import render
from layersample.training.data import load_data
from layersample.training.models import load_tokenizer

_BATCH_SIZE = 4


def make_batches(
    model: PreTrainedModel, path: str, source: str, *, count: int, max_length: int
) -> list[dict[str, Tensor]]:
    """Calibration batches of 4 examples from the start of a training set.

    A model that generates gets labels too, which samplers that train a little need. An encoder-decoder gets
    the same text on both sides.

    Args:
        model: The model.
        path: Where its tokenizer is: a folder or a hub id.
        source: As ``load_data`` takes it.
        count: Batches, at most; at least 1.
        max_length: Tokens of an example, at most; longer ones are cut, at the model's positions in any case.

    Returns:
        Mappings of the model's arguments, each ``(batch, tokens)``, padded on the right.

    Raises:
        ConfigError: If the data can't be read, or the model has no tokenizer.
    """
    data = load_data(source)
    try:
        tokenizer = load_tokenizer(path)
    except ConfigError as error:
        raise ConfigError(
            f"--data holds text, so the model must have a tokenizer, but {path} has none that loads. {error} "
            "Leave --data out to profile the weights alone."
        ) from error
    texts = [_text(row, tokenizer) for row in data.select(range(min(len(data), count * _BATCH_SIZE)))]
    length = min(max_length, positions_of(model.config) or max_length)
    rows = [tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in texts]
    # The end token alone, or nothing, is no calibration.
    rows = [row for row in rows if row]
    return [_pad(rows[i : i + _BATCH_SIZE], model) for i in range(0, len(rows), _BATCH_SIZE)]


def _text(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    if "text" in row:
        return str(row["text"])
    if "messages" not in row and isinstance(row["prompt"], str):
        return str(row["prompt"] + row["completion"])
    messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
    if tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in messages)
    return render(tokenizer, row, messages)


def _pad(rows: Sequence[Sequence[int]], model: PreTrainedModel) -> dict[str, Tensor]:
    """One batch; padded here, as not every tokenizer has a token for it, and the mask leaves it out anyway."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])  # (batch, tokens)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])  # (batch, tokens)
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.can_generate():
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    elif getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    return batch
