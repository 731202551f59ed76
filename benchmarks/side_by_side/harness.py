"""What a trained model scores on tasks of lm-evaluation-harness, run by the harness itself."""

from __future__ import annotations

import logging
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.exceptions import DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from layersample.errors import ConfigError, first_line

_TOKENS = 256  # that the harness generates where a task doesn't say how many

# Those that its own command sets before it scores: all runs then see the same examples, and those that it would.
_RANDOM_SEED, _SEED = 0, 1234


def check_tasks(names: Sequence[str], folder: Path | None, limit: int | None, positions: int | None) -> None:
    """Make sure that tasks can be asked, before anything trains.

    Args:
        names: Of tasks, as in :func:`load_tasks`.
        folder: Task files of the user's.
        limit: Examples of each task, at most.
        positions: Tokens that the model reads at most; ``None`` where there is no limit.

    Raises:
        ConfigError: As :func:`load_tasks`; if an answer would be longer than the model reads; if there is a folder or
            a limit, but no task.
    """
    if names:
        for name, task in load_tasks(names, folder)["tasks"].items():
            _check_answers(name, task, positions)
    elif folder is not None or limit is not None:
        raise ConfigError(
            "lm_eval_tasks and lm_eval_limit are of tasks of lm-evaluation-harness, but none is named: give --lm-eval."
        )


def load_tasks(names: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """The harness's tasks of some names, with their data, and with their groups.

    Args:
        names: Of tasks, groups and tags in the folder's files, or of the harness's own.
        folder: Task files (YAML) of the user's.

    Raises:
        ConfigError: If the harness isn't installed, a task is unknown, its data can't be had, or it can't be asked.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError('lm_eval needs lm-evaluation-harness: pip install "layersample[lm-eval]".')
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise ConfigError(f"lm_eval_tasks must be a folder of task files, but {folder} isn't one.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # thousands of files, which take seconds to read
        manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            close = get_close_matches(name, manager.all_tasks, 1)  # of thousands, too many to list
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"lm_eval: Unknown task of lm-evaluation-harness {name!r}.{hint} `lm-eval ls tasks` lists them all."
            )
    asked = ", ".join(names)
    try:
        loaded: dict[str, Any] = manager.load(list(names))
    except (OSError, DatasetNotFoundError) as error:  # the hub's and the network's are OSErrors
        raise ConfigError(
            f"lm_eval: the data of {asked} can't be had here ({first_line(error)}). Where no hub can be reached, "
            "choose tasks whose data is in local files, with lm_eval_tasks."
        ) from error
    except Exception as error:  # whatever a task's file or code does
        raise ConfigError(
            f"lm_eval: {asked} can't be used ({first_line(error)}): see their files."
        ) from error
    for name, task in loaded["tasks"].items():
        _check(name, task)
    return loaded


def _check(name: str, task: Any) -> None:
    """Set a task up as the harness's own command does, and make sure that it can ask something."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"lm_eval: the task {name!r} runs code that a model has written, which a benchmark doesn't."
        )
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)
    try:
        task.build_all_requests(limit=1, rank=0, world_size=1)
    except Exception as error:  # its template, its targets, or fewer examples than it shows
        raise ConfigError(
            f"lm_eval: the task {name!r} can't be asked ({first_line(error)}): see its file."
        ) from error
    task.set_fewshot_seed(seed=_SEED)  # some have been drawn


def _check_answers(name: str, task: Any, positions: int | None) -> None:
    """Make sure that a prompt finds room beside the answer: the harness cuts it to what is left."""
    if task.OUTPUT_TYPE != "generate_until" or positions is None:
        return
    given = task.get_config("generation_kwargs") or {}
    tokens = given.get("max_gen_toks") or given.get("max_new_tokens") or given.get("max_tokens") or _TOKENS
    if not str(tokens).isdecimal() or int(tokens) >= positions:
        raise ConfigError(
            f"lm_eval: answers must be shorter than the {positions} tokens that the model reads, but the task "
            f"{name!r} has them generated to {tokens}: lower max_gen_toks in its file."
        )


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    folder: Path | None,
    *,
    limit: int | None,
) -> dict[str, Any]:
    """Save a model, and have the harness load and score it.

    Args:
        model: The trained model; adapters are merged into a saved one.
        tokenizer: Its tokenizer.
        names: Tasks.
        folder: Task files of the user's.
        limit: Examples of each task, at most.

    Returns:
        ``"lm_eval"``: for each task and group, its metrics as the harness names them, those that are finite; and
        ``"lm_eval_higher_is_better"``: for each task and group, what is known of them.

    Raises:
        ConfigError: As :func:`load_tasks`.
    """
    tasks = load_tasks(names, folder)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with tempfile.TemporaryDirectory(prefix="layersample-harness-") as scratch:
        merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        merged.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        random.seed(_RANDOM_SEED)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        scorer = HFLM(pretrained=scratch, device=str(model.device), dtype="auto", batch_size=8)
        found: Mapping[str, Any] = lm_eval.evaluate(
            scorer, tasks, limit=limit, bootstrap_iters=0, log_samples=False
        )
    return {
        "lm_eval": {task: _numbers(metrics) for task, metrics in found["results"].items()},
        "lm_eval_higher_is_better": {
            task: {metric: up for metric, up in known.items() if up is not None}
            for task, known in found.get("higher_is_better", {}).items()
        },
    }


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """``acc,none`` and the like, without the filter where there is none."""
    numbers = {key.removesuffix(",none"): value for key, value in metrics.items() if key != "sample_len"}
    return {
        key: float(value)
        for key, value in numbers.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
