"""How long the examples are that the runs of a suite train on: plans of memory go by them."""

from __future__ import annotations

from .suite import Suite
from .tasks import get_task, split


def longest_example(suite: Suite) -> int:
    """Tokens of the longest example that a run trains on in its first ``suite.steps`` steps, with whatever seed.

    Raises:
        ConfigError: If the data can't be read, or nothing can be learned from it.
    """
    # Seconds of imports, which a report doesn't need.
    from layersample.training.models import load_tokenizer
    from layersample.training.trainer import CheckedTrainer

    config = suite.final_config(suite.entries[0])
    tokenizer, task = load_tokenizer(suite.model), get_task(suite.task, suite.answer_marker)
    longest = 0
    for seed in suite.all_seeds:
        parts = split(
            task,
            validation_size=suite.validation_size,
            test_size=suite.test_size,
            train_size=suite.steps * config.batch_size * config.gradient_accumulation,
            seed=seed,
        )
        rows = CheckedTrainer.prepare(parts.train, tokenizer, config.train_on, config.max_length)
        longest = max(longest, *map(len, rows["input_ids"]))
    return longest
