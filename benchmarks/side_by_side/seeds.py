"""Seeds as one types them: a number of them, or numbers and ranges."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from layersample.errors import ConfigError, repeated

MOST_SEEDS = 1000


def read_seeds(text: str) -> list[int]:
    """Seeds as one types them: how many, or numbers and ranges with commas (``8-23,40``).

    Raises:
        ConfigError: If they aren't that.
    """
    found = [re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()) for part in text.split(",") if part.strip()]
    ranges = [(int(each[1]), int(each[2] or each[1])) for each in found if each]
    if not found or len(ranges) < len(found):
        raise ConfigError(f"seeds must be a number, or numbers and ranges with commas, but got {text!r}.")
    if text.strip().isdecimal():
        if not 1 <= ranges[0][0] <= MOST_SEEDS:
            raise ConfigError(f"A number of seeds must be from 1 to {MOST_SEEDS}, but got {text}.")
        return list(range(ranges[0][0]))
    if wrong := [pair for pair in ranges if not 0 <= pair[1] - pair[0] < MOST_SEEDS]:
        raise ConfigError(
            f"A range of seeds must go up, by at most {MOST_SEEDS}, but got {wrong[0][0]}-{wrong[0][1]}."
        )
    return [seed for first, last in ranges for seed in range(first, last + 1)]


def check_seeds(seeds: Sequence[int]) -> None:
    """Make sure that seeds can be run.

    Raises:
        ConfigError: If one comes twice, or no generator takes it.
    """
    if twice := repeated(seeds):
        raise ConfigError(f"seeds must all be different, but {', '.join(map(str, twice))} comes twice.")
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise ConfigError(f"seeds must be between 0 and 2**32 - 1, but got {wrong[0]}.")


def as_seeds(value: Any) -> Any:
    """A number of seeds is as many from 0 on, and a text is read, as ``--seeds`` has it."""
    if isinstance(value, str):
        try:
            return read_seeds(value)
        except ConfigError as error:
            raise ValueError(str(error).rstrip(".")) from error
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= MOST_SEEDS:
            raise ValueError(f"a number of seeds must be from 1 to {MOST_SEEDS}")
        return list(range(value))
    return value
