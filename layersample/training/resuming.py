"""A run that is resumed: with the options that it was begun with, and on any number of ranks with the same steps."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import yaml

from layersample.config import TrainConfig, write_yaml
from layersample.errors import ConfigError
from layersample.files import write_json
from layersample.option_files import read_yaml
from layersample.options import Role, names_with

RANKS = "ranks.json"
"""The file of a run's folder that says on how many ranks it continues, where there are several."""

APART_FROM = ("batch_size", "gradient_accumulation")
"""What may change with the number of ranks."""


def check_same_run(config: TrainConfig, stored: Path, apart_from: Collection[str] = ()) -> None:
    """Make sure that a run is resumed with the options that it was begun with.

    Args:
        config: The options now.
        stored: The run's ``config.yaml``; nothing is checked where there is none.
        apart_from: Options that may differ.

    Raises:
        ConfigError: If others have changed, and ``allow_changes`` is off; it gives both values of each.
    """
    if config.allow_changes or not stored.is_file():
        return
    before, now = read_yaml(stored), yaml.safe_load(write_yaml(config))
    fixed = names_with(TrainConfig, Role.IDENTITY) - set(apart_from)
    changed = [
        f"{key} was {before[key]!r}, but is {now[key]!r} now"
        for key in sorted(before.keys() & now.keys() & fixed)
        if before[key] != now[key]
    ]
    if changed:
        raise ConfigError(
            f"A run must be resumed with the options it was begun with: {'; '.join(changed)}. Leave them as they "
            "were, or add --allow-changes: its result will then be that of neither."
        )


def note_ranks(folder: Path, count: int) -> None:
    """Write down on how many ranks a run goes on, beside its ``config.yaml``."""
    if count > 1:
        write_json(folder / RANKS, {"ranks": count})
    else:
        (folder / RANKS).unlink(missing_ok=True)


def keep_steps(config: TrainConfig, ranks: int) -> tuple[int, int]:
    """Batch size and gradient accumulation by which a resumed run's steps have as many examples as before.

    A step takes the next batches in the order of the data, whoever computes them; so with as many examples in a step,
    it has the same ones.

    Args:
        config: The options now.
        ranks: How many ranks there are now.

    Returns:
        The two, those of ``config`` where the number of ranks is as it was.

    Raises:
        ConfigError: If there are no such numbers, or those of ``config`` are others than the run's own and give other
            steps.
    """
    now = config.batch_size, config.gradient_accumulation
    if not config.resume or config.output is None or config.allow_changes:
        return now
    before = ranks_of(config.output)
    if before == ranks or not (config.output / "config.yaml").is_file():
        return now
    stored = read_yaml(config.output / "config.yaml")
    own = stored["batch_size"], stored["gradient_accumulation"]
    examples = before * own[0] * own[1]
    if now != own and now[0] * now[1] * ranks == examples:
        return now
    # Batches stay as large as they are, if they can, and are never larger: they fit on the device.
    share, rest = divmod(examples, ranks)
    fitting = [size for size in range(min(own[0], share), 0, -1) if share % size == 0]
    if now != own or rest or not fitting:
        raise ConfigError(
            f"Each step of the run in {config.output} has {examples} examples ({_product(before, *own)}), but would "
            f"have {ranks * now[0] * now[1]} ({_product(ranks, *now)}). Choose --batch-size and "
            "--gradient-accumulation that give as many, or another number of ranks, or add --allow-changes."
        )
    return fitting[0], share // fitting[0]


def ranks_of(folder: Path) -> int:
    """On how many ranks the run in a folder went on last."""
    path = folder / RANKS
    return int(json.loads(path.read_text(encoding="utf-8"))["ranks"]) if path.is_file() else 1


def _product(ranks: int, batch_size: int, accumulation: int) -> str:
    return f"{ranks} rank{'s' * (ranks > 1)} × batch_size {batch_size} × gradient_accumulation {accumulation}"
