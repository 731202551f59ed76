"""Run a function over many matrices: one matrix a thread, one LAPACK thread a matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]


def map_parallel(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Apply a function to each item on threads whose linear algebra is single-threaded.

    Two LAPACK threads on one matrix of a few hundred rows cost 2.5 times the CPU time of one and are no
    faster, so the threads go to different matrices instead. NumPy's and torch's own thread counts are those
    of before when this returns or raises.

    Args:
        function: Called once an item; it should spend its time in NumPy or torch, which let go of the
            interpreter's lock.
        items: What to apply it to.
        workers: Threads, at least 1; by default as many as torch uses.
        progress: Called in this thread with (items done, all items) after each.

    Returns:
        The results, in the order of the items.

    Raises:
        ValueError: If ``workers`` is below 1.
    """
    before = torch.get_num_threads()
    workers = before if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be at least 1 thread, but got workers={workers}.")
    # torch counts its OpenMP threads per calling thread: each worker has to say it for itself.
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        try:
            futures = [pool.submit(function, item) for item in items]
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()  # the first failure ends the rest
                if progress is not None:
                    progress(done, len(futures))
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(before)
