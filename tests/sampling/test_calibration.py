"""Calibration batches of a loop: what can be read once only isn't taken, and no example is lost for training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader

from layersample import ConfigError
from layersample.sampling.calibration import reader_of
from tests.integrations.test_first_batches import ONCE, ROWS, Stream, load


class Reader:
    """Gives the same iterator each time."""

    def __init__(self) -> None:
        self._rows = iter(ROWS)

    def __iter__(self) -> Iterator[Any]:
        return self._rows


@pytest.mark.parametrize(
    "make", [lambda: iter(ROWS), lambda: (row for row in ROWS), Reader], ids=["iter", "gen", "class"]
)
def test_an_iterator_is_refused_with_what_to_do(make: Any) -> None:
    with pytest.raises(ConfigError, match="readable more than once, .*chain\\(first, stream\\)"):
        reader_of(make())


@pytest.mark.parametrize("kind", ONCE)
def test_a_loader_of_a_stream_that_can_be_read_once_is_refused(kind: str) -> None:
    read = reader_of(DataLoader(ONCE[kind](), batch_size=2, collate_fn=list))
    assert read is not None
    with pytest.raises(ConfigError, match="a second reading of .* doesn't begin with the first example"):
        read()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ROWS,
        lambda: load(ROWS),
        lambda: load(Stream(ROWS)),
    ],
)
def test_what_can_be_read_again_is_read_again(make: Any) -> None:
    read = reader_of(make())
    assert read is not None
    assert str(list(read())) == str(list(read())) != "[]"
