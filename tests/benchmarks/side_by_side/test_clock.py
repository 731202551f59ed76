from __future__ import annotations

import time

import pytest

from layersample_benchmarks.side_by_side.clock import PhaseClock


def test_adds_up_what_each_part_takes() -> None:
    clock = PhaseClock()
    for _ in range(2):
        with clock.phase("forward"):
            time.sleep(0.01)
    seconds = clock.seconds["forward"]
    assert 0.02 <= seconds["wall"] < 1 and seconds["cpu"] < seconds["wall"], "sleep takes no CPU time"
    clock.begin_step()
    assert clock.seconds == {}


def test_a_part_that_never_began_takes_nothing() -> None:
    clock = PhaseClock()
    clock.stop("sampling")
    assert clock.seconds == {}


def test_a_part_that_fails_is_timed_too() -> None:
    clock = PhaseClock()
    with pytest.raises(ZeroDivisionError), clock.phase("forward"):
        1 / 0  # noqa: B018
    assert "forward" in clock.seconds
