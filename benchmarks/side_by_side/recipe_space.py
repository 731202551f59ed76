"""What a search for a recipe may choose from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from layersample.option_files import Options

RATE = "learning_rate"
VARIANT = "variant"  # options that go together, as a sampler and its own options


class Range(Options):
    """Numbers to choose from.

    Args:
        low: The lowest.
        high: The highest.
        log: Whether each order of magnitude is as likely as the next; for learning rates.
        whole: Whether they are whole numbers.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @model_validator(mode="after")
    def _is_one(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, but they are {self.low:g} and {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 where log is true, but is {self.low:g}")
        return self


def _kind(value: Any) -> str:
    return "range" if isinstance(value, dict | Range) else "values"


# Told apart by what they are, so that a message is about the one that was meant.
Choice = Annotated[Annotated[list[Any], Tag("values")] | Annotated[Range, Tag("range")], Discriminator(_kind)]


class RecipeSpace(Options):
    """A search for the best options of a method, by successive halving on the validation split.

    Args:
        method: A sampler, SAMPLER+PROJECTION, or a baseline; the search's name by default.
        options: Options of ``layersample train`` that all tries have.
        space: For each option that is searched (or ``learning_rate``), its values, or a range of numbers. The values
            of ``variant`` are mappings of options that go together.
        tries: Recipes that are tried.
        keep: One in so many of a wave goes on to the next rung.
        rungs: Lengths of a run; the last is the suite's steps, and each other one shorter by ``keep``.
        waves: Parts in which the tries are made: later ones follow what earlier ones found.
        seed: Seed of data order and draws of the tries.
        seeds: Runs of each recipe on the last rung, with seeds from ``seed`` on; its loss there is their mean. All of
            them are none of the suite's, which are for the confirmation.
    """

    method: str = ""
    options: dict[str, Any] = {}
    space: dict[str, Choice] = Field(min_length=1)
    tries: int = Field(18, ge=1, le=10_000)
    keep: int = Field(3, ge=2, le=100)
    rungs: int = Field(3, ge=1, le=10)
    waves: int = Field(2, ge=1, le=1000)
    seed: int = Field(1000, ge=0, lt=2**32)
    seeds: int = Field(3, ge=1, le=1000)

    @model_validator(mode="after")
    def _can_be_searched(self) -> RecipeSpace:
        if RATE not in self.space:
            raise ValueError(f"space must hold {RATE}, since a recipe is no better than its rate")
        rates = self.space[RATE]
        for rate in (rates.low, rates.high) if isinstance(rates, Range) else rates:
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
                raise ValueError(
                    f"space: the values of {RATE} must be finite numbers above 0, but one is {rate!r}"
                )
        if empty := [name for name, values in self.space.items() if not values]:
            raise ValueError(f"space must hold values for {empty[0]}, but it has none")
        if self.seed + self.seeds > 2**32:
            raise ValueError(f"seed + seeds must be at most 2**32, but they are {self.seed} + {self.seeds}")
        variants = self.space.get(VARIANT, [])
        if isinstance(variants, Range) or not all(isinstance(variant, dict) for variant in variants):
            raise ValueError(f"the values of {VARIANT} must be mappings of options, as {{sampler: cyclic}}")
        varied = {option for variant in variants for option in variant}
        if both := sorted(self.options.keys() & {*self.space, *varied} | self.space.keys() & varied):
            raise ValueError(
                f"{both[0]} must be in options, in space or in a {VARIANT}, but it is in two of them"
            )
        return self

    def options_of(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a try, without its learning rate."""
        plain = {option: value for option, value in chosen.items() if option not in (RATE, VARIANT)}
        return {**self.options, **plain, **chosen.get(VARIANT, {})}

    def seeds_of(self, rung: int) -> range:
        """Seeds of a rung's runs: one tells good recipes from bad ones, but not the best from the next best."""
        return range(self.seed, self.seed + (self.seeds if rung == self.rungs - 1 else 1))

    def steps(self, rung: int, whole: int) -> int:
        """Optimizer steps of a run on a rung, from 0 on, of a run that has ``whole`` in the end."""
        parts = int(self.keep ** (self.rungs - 1 - rung))
        return max(1, round(whole / parts))
