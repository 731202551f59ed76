"""What the examples share: a model, its tokenizer, and worked problems, from the command line's options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from layersample.training.data import load_data
from layersample.training.models import load_model


def parse(description: str | None) -> argparse.Namespace:
    """Options of every example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="smollm2-135m", help="built-in name, folder or hub id")
    parser.add_argument("--data", default="gsm_symbolic", help="built-in name, file or hub id")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--output", default="runs/example", help="folder for the Trainer's files")
    return parser.parse_args()


def model_and_tokenizer(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model."""
    return load_model(options.model, report=print)


def pairs(options: argparse.Namespace) -> Dataset:
    """Preferences, as ``prompt``, ``chosen`` and ``rejected``: a solution, and that of the next problem."""
    data = load_data(options.data)
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
            for row, other in zip(data, data.select([*range(1, len(data)), 0]), strict=True)
        ]
    )


def show_steps(trainer: Trainer) -> None:
    """Print the loss and the active layers of each step that was logged."""
    for record in trainer.state.log_history:
        if "loss" in record:
            print(f"step {record['step']}: loss {record['loss']:.3f}, layers {record['active_layers']}")


def batches(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, size: int = 4, length: int = 192
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a batch for each step: token ids and labels of shape ``(size, length)`` at most."""
    data = load_data(options.data)
    for step in range(options.steps):
        rows = [data[(step * size + i) % len(data)] for i in range(size)]
        texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=length)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        yield dict(batch)
