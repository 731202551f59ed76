"""Layer sampling in TRL's GRPOTrainer: a reward for each digit that stands in the worked solution too."""

from __future__ import annotations

from typing import Any

from common import model_and_tokenizer, parse, show_steps
from trl import GRPOConfig, GRPOTrainer

from layersample import LayerSamplingCallback
from layersample.training.data import load_data


def shared_digits(completions: list[str], solution: list[str], **columns: Any) -> list[float | None]:
    """The part of a completion's characters that are digits of the solution; between 0 and 1."""
    return [
        sum(character.isdigit() and character in right for character in text) / max(1, len(text))
        for text, right in zip(completions, solution, strict=True)
    ]


options = parse(__doc__)
model, tokenizer = model_and_tokenizer(options)
trainer = GRPOTrainer(
    model=model,
    reward_funcs=shared_digits,
    processing_class=tokenizer,
    args=GRPOConfig(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=16,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
    ),
    # TRL would take a column of this name for something else.
    train_dataset=load_data(options.data).rename_column("completion", "solution"),
)
LayerSamplingCallback("lisa", num_active=2, period=5).attach(trainer)
trainer.train()
show_steps(trainer)
