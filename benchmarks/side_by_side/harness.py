"""What a trained model scores on tasks of lm-evaluation-harness, run by the harness itself."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from layersample.errors import ConfigError

Scores = dict[str, dict[str, float]]


def load_tasks(names: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """The harness's tasks of some names, with their data.

    Args:
        names: Of tasks in the folder's files, or of the harness's own.
        folder: Task files (YAML) of the user's.

    Raises:
        ConfigError: If the harness isn't installed, a task is unknown, or its data can't be had.
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
    tasks: dict[str, Any] = {}
    for name in names:
        if name not in manager.all_tasks:
            close = get_close_matches(name, manager.all_tasks, 1)  # of thousands, too many to list
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"lm_eval: Unknown task of lm-evaluation-harness {name!r}.{hint} `lm-eval ls tasks` lists them all."
            )
        try:
            tasks |= manager.load_task_or_group([name])
        except Exception as error:  # whatever a task's code, its data's builder or the network does
            reason = (str(error).splitlines() or [""])[0]
            raise ConfigError(
                f"lm_eval: the data of the task {name!r} can't be had here ({type(error).__name__}: {reason}). Where "
                "no hub can be reached, choose tasks whose data is in local files, with lm_eval_tasks."
            ) from error
    return tasks


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    folder: Path | None,
    *,
    limit: int | None,
) -> Scores:
    """Save a model, and have the harness load and score it.

    Args:
        model: The trained model; adapters are merged into a saved one.
        tokenizer: Its tokenizer.
        names: Tasks.
        folder: Task files of the user's.
        limit: Examples of each task, at most.

    Returns:
        For each task, its metrics and their standard errors, as the harness names them.

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
        scorer = HFLM(pretrained=scratch, device=str(model.device), dtype="auto", batch_size=8)
        found: Mapping[str, Any] = lm_eval.evaluate(
            scorer, tasks, limit=limit, bootstrap_iters=0, log_samples=False
        )
    return {task: _numbers(metrics) for task, metrics in found["results"].items()}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """``acc,none`` and the like, without the filter where there is none."""
    numbers = {key.removesuffix(",none"): value for key, value in metrics.items() if key != "sample_len"}
    return {key: float(value) for key, value in numbers.items() if isinstance(value, int | float)}
