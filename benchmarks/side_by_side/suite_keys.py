"""Which keys of a suite, and which options of its rows, decide what."""

from __future__ import annotations

from layersample.config import TrainConfig
from layersample.options import Role, names_with

# What rates were tried with. It decides which rate is chosen, but no number of a run.
SEARCH_SEEDS = ("search_seed", "search_seeds")

# What decides no number of a run: rows, rates and seeds are added, and the report reads the rest.
DECIDES_NOTHING = {
    "methods",
    "seeds",
    "learning_rates",
    "search_extensions",
    *SEARCH_SEEDS,
    "baseline",
    "confidence",
    "equivalence",
    "plugin",
    "recipes",
}

# What decides how much a method is given; of no meaning where all have the same steps.
MATCHING = {
    "match",
    "match_to",
    "time_share",
    "memory_share",
    "timing_rounds",
    "timing_steps",
    "timing_whole",
}

# The same where no task of the harness is asked for.
HARNESS = {"lm_eval", "lm_eval_tasks", "lm_eval_limit"}

# What of the Trainer's own arguments the suite sets, or what is measured needs.
TRAINER_SET_HERE = {
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "learning_rate",
    "max_length",
    "seed",
    "data_seed",
    "logging_steps",
    "logging_strategy",
    "logging_first_step",
}

# What the benchmark sets itself, so that every method has the same.
SET_HERE = names_with(TrainConfig, Role.SUITE)
