"""Memory over many switches: with state dropped or offloaded it must not grow, on the device or in its allocator."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from layersample import LayerScheduler, measure_memory

from .bench import Bench, Row, loss_of

SWITCHES, BOUND = 50, 0.01


def measure(bench: Bench) -> Iterator[Row]:
    """Train 50 periods of one step under each policy that must stay flat."""
    shape = bench.shape("tinyllama-1.1b")
    for state in ("drop", "offload"):
        model = bench.model(shape, torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        tokens = bench.tokens(shape, 1, 32)
        held: dict[str, list[int]] = {"optimizer state": [], "allocated": [], "reserved": []}
        with LayerScheduler(model, optimizer, "cyclic", num_active=2, period=1, state=state) as scheduler:
            for _ in range(SWITCHES):
                loss_of(model, tokens).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                held["optimizer state"].append(measure_memory(model, optimizer).optimizer_state)
                if bench.on_gpu:
                    held["allocated"].append(torch.cuda.memory_allocated())
                    held["reserved"].append(torch.cuda.memory_reserved())
        del model, optimizer, scheduler
        bench.release()
        for what, sizes in held.items():
            name = f"{what} over {SWITCHES} switches, state={state}"
            if not sizes:
                yield Row("flat memory", name, "", "", "no meaning", {})
                continue
            # From the second turn through the layers on: by then everything has been there once.
            early, late = max(sizes[: len(sizes) // 2]), max(sizes[len(sizes) // 2 :])
            flat = late <= early * (1 + BOUND)
            found = f"{late / 2**20:.1f} MiB at most, {late / early - 1:+.1%} in the second half"
            yield Row("flat memory", name, found, "at most +1%", "met" if flat else "MISS", {"bytes": sizes})
