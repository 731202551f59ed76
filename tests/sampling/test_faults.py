"""Errors of a sampler's own code: the sampler is named, with the file and line, and nothing is left on the model."""

from __future__ import annotations

import traceback
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layersample import ConfigError, LayerSampler, LayerScheduler, SamplingContext
from layersample.registry import load_plugin
from layersample.sampling.faults import SamplerError
from layersample.sampling.full_rank import FullRank
from tests.helpers import make_llama

PLUGIN = """
from layersample import LayerSampler, register

@register("mine")
class Mine(LayerSampler):
    '''Raise.'''
    def sample(self, context):
        return self.pick(context)
    def pick(self, context):
        {body}
"""


def start(sampler: Any, **options: Any) -> LayerScheduler:
    model = make_llama()
    return LayerScheduler(model, torch.optim.AdamW(model.parameters()), sampler, **options)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("return {}['mine']", "KeyError: 'mine'"),
        ("return [0] + None", "TypeError: "),
        ("raise ValueError('not today')", "ValueError: not today"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("return next(iter(()))", "StopIteration: "),
        ("return (1 / 0 for _ in range(2))", "ZeroDivisionError: "),
    ],
)
def test_a_plugin_that_raises_is_named_with_file_and_line(tmp_path: Path, body: str, error: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN.format(body=body))
    load_plugin(path)
    with pytest.raises(SamplerError) as caught:
        start("mine")
    assert f"Sampler mine, period 0: {path}, line 10, in " in str(caught.value)
    assert f"raised {error}" in str(caught.value)
    cause = caught.value.__cause__
    assert cause is not None
    files = {frame.filename for frame in traceback.extract_tb(cause.__traceback__)}
    assert files == {str(path)}, "a traceback of the plug-in only"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "must return distinct integers from 0 to 3, but returned None in period 0"),
        (1, "but returned 1 in period 0"),
        ([True], r"but returned \[True\] in period 0"),
        ([4], r"but returned \[4\] in period 0"),
        ([1, 1], r"but returned \[1, 1\] in period 0"),
        ("01", "but returned .* in period 0"),
        (b"\0\1", "but returned .* in period 0"),
        ([-1], r"but returned \[-1\] in period 0"),
        ([1.0], r"but returned \[1.0\] in period 0"),
        ({0: 0.9, 1: 0.1}, "but returned {0: 0.9, 1: 0.1} in period 0"),
        (np.array([True, False, False, False]), "but returned .*True.* in period 0"),
        (torch.tensor([True, False, False, False]), "but returned .*True.* in period 0"),
        (torch.tensor([[0, 1]]), "but returned .* in period 0"),
        (np.array([0.0, 1.0]), "but returned .* in period 0"),
        (count(), r"but returned \[0, 1, 2, 3, 4\] in period 0"),
    ],
    ids=str,
)
def test_what_is_returned_must_be_layers(returned: Any, message: str) -> None:
    class Gives(LayerSampler):
        def sample(self, context: SamplingContext) -> Any:
            return returned

    with pytest.raises(ConfigError, match=message):
        start(Gives())


@pytest.mark.parametrize(
    "returned",
    [
        {2, 0},
        frozenset({2, 0}),
        (index for index in (2, 0)),
        np.array([2, 0]),
        [np.int64(2), np.uint8(0)],
        torch.tensor([2, 0]),
        {2: None, 0: None}.keys(),
        range(0, 3, 2),
    ],
    ids=lambda returned: type(returned).__name__,
)
def test_layers_are_a_set_of_integers_of_any_kind(returned: Any) -> None:
    class Gives(LayerSampler):
        def sample(self, context: SamplingContext) -> Any:
            return returned

    scheduler = start(Gives())
    assert scheduler.active == (0, 2)
    assert all(type(index) is int for index in scheduler.active), "a checkpoint holds them"


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        ([0], r"\[0\]"),
        (FullRank(frozenset({4}), 0.5), "FullRank"),
        (FullRank(frozenset({True}), 0.5), "FullRank"),
        (FullRank(frozenset({0}), 1.0), "FullRank"),
        (FullRank(frozenset({0}), float("nan")), "FullRank"),
    ],
    ids=["a list", "no such layer", "a truth value", "a certain chance", "no chance"],
)
def test_what_is_left_at_full_rank_must_be_layers_and_a_chance(returned: Any, shown: str) -> None:
    class Leaves(LayerSampler):
        needs_projection = True

        def sample(self, context: SamplingContext) -> list[int]:
            return [0]

        def full_rank(self, context: SamplingContext) -> Any:
            return returned

    with pytest.raises(ConfigError, match=rf"Leaves.full_rank must return a FullRank .*but returned {shown}"):
        start(Leaves(), projection="galore")


@pytest.mark.parametrize(
    "inclusion",
    [[1.0], [float("nan")] * 4, [0.5, 0.5, -0.5, 0.5], [2.0] * 4, dict.fromkeys(range(4), 0.5), 1.0],
)
def test_inclusion_probabilities_must_be_numbers_of_layers(inclusion: Any) -> None:
    class Knows(LayerSampler):
        def sample(self, context: SamplingContext) -> list[int]:
            return [0]

        def inclusion_probabilities(self, context: SamplingContext) -> Any:
            return inclusion

    with pytest.raises(
        ConfigError, match="Sampler Knows, .* must return 4 numbers from 0 to 1, one a layer .*, or None"
    ):
        start(Knows())


def test_an_error_in_a_later_period_names_it() -> None:
    class Later(LayerSampler):
        def sample(self, context: SamplingContext) -> list[int]:
            if context.round:
                raise RuntimeError("later")
            return [0]

    scheduler = start(Later(), period=1)
    with pytest.raises(
        ConfigError, match="Sampler Later, period 1: .*test_faults.py, line .* RuntimeError: later"
    ):
        scheduler.step()


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_the_sampler_stays_what_it_is(error: type[BaseException]) -> None:
    class Large(LayerSampler):
        def sample(self, context: SamplingContext) -> list[int]:
            raise error("too much")

    with pytest.raises(error, match="too much"):
        start(Large())


def test_a_plugin_that_ends_the_program_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "ends.py"
    path.write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ConfigError, match="ends.py, line 2, called sys.exit"):
        load_plugin(path)


def test_calibration_batches_must_be_readable_again() -> None:
    with pytest.raises(ConfigError, match="batches must be readable more than once, but got generator"):
        start("lisa", batches=({} for _ in range(2)))
