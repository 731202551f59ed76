"""The rows of a benchmark's table."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from layersample.option_files import Options

from ..methods.catalog import get_method
from ..methods.method import Method
from .seeds import as_seeds


class MethodEntry(Options):
    """A row of the table.

    Args:
        name: Its name; different in each row.
        method: A sampler, SAMPLER+PROJECTION, or a baseline; its name by default.
        options: Options of ``layersample train`` for this row alone.
        learning_rates: Its own learning rates, in place of the suite's.
        seeds: Its own seeds, in place of the suite's: the rows that matter most may have more.
    """

    name: str = Field(min_length=1, max_length=100, pattern=r"^[^/\s|<>,]+$")
    method: str = ""
    options: dict[str, Any] = {}
    learning_rates: list[float] | None = Field(None, min_length=1)
    seeds: Annotated[list[int] | None, BeforeValidator(as_seeds)] = Field(None, min_length=1)

    @property
    def definition(self) -> Method:
        """The method behind the row."""
        return get_method(self.method or self.name)


def named_entry(name: str) -> MethodEntry:
    """The row of a method without options of its own."""
    get_method(name)  # says what is wrong with a name better than the pattern of names does
    return MethodEntry(name=name)
