from __future__ import annotations

import time

import pytest
import torch
from threadpoolctl import threadpool_info

from layersample.metrics import map_parallel


def threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_results_come_in_order_and_progress_counts_up() -> None:
    seen: list[tuple[int, int]] = []

    def slow_first(item: int) -> int:
        time.sleep(0.05 if item == 0 else 0.0)
        return item * item

    results = map_parallel(
        slow_first, range(6), workers=3, progress=lambda done, total: seen.append((done, total))
    )
    assert results == [0, 1, 4, 9, 16, 25]
    assert seen == [(done, 6) for done in range(1, 7)]


def test_one_blas_thread_inside_and_as_many_as_before_after() -> None:
    before = threads(), torch.get_num_threads()
    inside = map_parallel(lambda _: (threads(), torch.get_num_threads()), range(3), workers=2)
    assert all(set(blas) == {1} and torch_threads == 1 for blas, torch_threads in inside)
    assert (threads(), torch.get_num_threads()) == before


def test_a_failure_is_raised_and_threads_are_restored() -> None:
    before = threads(), torch.get_num_threads()
    done: list[int] = []

    def fail(item: int) -> None:
        if item == 0:
            raise ValueError("broken")
        time.sleep(0.01)
        done.append(item)

    with pytest.raises(ValueError, match="broken"):
        map_parallel(fail, range(500), workers=2)
    assert len(done) < 400  # the rest isn't started
    assert (threads(), torch.get_num_threads()) == before


def test_nothing_to_do() -> None:
    assert map_parallel(abs, []) == []


def test_workers_below_one() -> None:
    with pytest.raises(ValueError, match="at least 1 thread, but got workers=0"):
        map_parallel(abs, [1], workers=0)
