"""How far plans are from what steps really take: ``python -m layersample_benchmarks.plan_check``.

Each setting is planned on fake tensors, and run on real ones of random values, whose peak torch's allocator reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import AutoModelForCausalLM

from layersample import LayerScheduler
from layersample.activations.save_memory import save_memory
from layersample.config import TrainConfig
from layersample.optim.memory_use import optimizer_tensors
from layersample.planning.fake_models import add_lora
from layersample.planning.shapes import load_shape
from layersample.planning.simulation import schedule_given, simulate_step

from .measured_peak import measured_step_peak
from .store import RESULTS, store

FROZEN = {"embeddings": "freeze", "head": "freeze", "norm": "freeze"}
AS_RUN = {"loss_chunk": 0, "recompute": False, "master_weights": False}
SMALL, LARGE = {"batch_size": 4, "max_length": 128}, {"batch_size": 8, "max_length": 256}
BF16: dict[str, Any] = {"precision": "bf16"}
LEAN: dict[str, Any] = {**BF16, "master_weights": False, "gradient_checkpointing": True}
BACKWARD: dict[str, Any] = {"step_in_backward": True, "clip_by": "running"}
MIDDLE, EVERY = (9, 20), tuple(range(30))


@dataclass(frozen=True)
class Setting:
    """What is planned and run.

    Args:
        name: Name of the row.
        active: Indices of the layers that train.
        options: Options of the run.
        lora_rank: Rank of a LoRA in place of layers.
    """

    name: str
    active: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    lora_rank: int | None = None


SETTINGS = (
    Setting("lisa, fp32", MIDDLE, SMALL),
    Setting("lisa, bf16 on fp32 masters", MIDDLE, {**SMALL, "precision": "bf16"}),
    Setting("lisa, pure bf16", MIDDLE, {**SMALL, "precision": "bf16", "master_weights": False}),
    Setting("lisa, mixed precision", MIDDLE, {**SMALL, "precision": "bf16-mixed"}),
    Setting("lisa, checkpointing", MIDDLE, {**SMALL, "gradient_checkpointing": True}),
    Setting("lisa, 1 × 512 tokens", MIDDLE, {"batch_size": 1, "max_length": 512}),
    Setting("layers 0 and 15, embedding frozen", (0, 15), {**SMALL, **FROZEN}),
    Setting("layers 28 and 29, embedding frozen", (28, 29), {**SMALL, **FROZEN}),
    Setting("layers 9 and 20, bf16, 8 × 256", MIDDLE, {**LARGE, **FROZEN, "precision": "bf16"}),
    Setting("same, int8", MIDDLE, {**LARGE, **FROZEN, **BF16, "frozen_weights": "int8"}),
    Setting("same, nf4", MIDDLE, {**LARGE, **FROZEN, **BF16, "frozen_weights": "nf4"}),
    Setting("same, nf4, checkpointing", MIDDLE, {**LARGE, **FROZEN, **LEAN, "frozen_weights": "nf4"}),
    Setting(
        "nf4, ends trained, step in backward", MIDDLE, {**SMALL, **LEAN, **BACKWARD, "frozen_weights": "nf4"}
    ),
    Setting(
        "int8 on fp32 masters, step in backward",
        (0, 29),
        {**SMALL, **BF16, **BACKWARD, "frozen_weights": "int8"},
    ),
    Setting("5 layers, GaLore rank 128", (2, 7, 12, 17, 22), {**SMALL, "projection": "galore", "rank": 128}),
    Setting(
        "5 layers, GaLore rank 128, bf16, checkpointing",
        (2, 7, 12, 17, 22),
        {**SMALL, "projection": "galore", "rank": 128, "precision": "bf16", "gradient_checkpointing": True},
    ),
    Setting("full fine-tuning", EVERY, {**SMALL, **AS_RUN}),
    Setting("full fine-tuning, pure bf16", EVERY, {**SMALL, **AS_RUN, "precision": "bf16"}),
    Setting("LISA as published", MIDDLE, {**SMALL, **AS_RUN, "state": "keep"}),
    Setting("GaLore rank 128, whole model", EVERY, {**SMALL, **AS_RUN, "projection": "galore", "rank": 128}),
    Setting("LoRA rank 16", (), {**SMALL, **AS_RUN}, lora_rank=16),
)


def run_setting(setting: Setting, model_name: str) -> int:
    """Bytes at the peak of the second step of a run: weights, state and all that comes and goes."""
    config = TrainConfig(**setting.options)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model: nn.Module = AutoModelForCausalLM.from_config(load_shape(model_name), dtype=dtype).train()
    if setting.lora_rank is not None:
        model = add_lora(model, setting.lora_rank)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5, fused=True)
    tokens = torch.randint(0, 1000, (config.batch_size, config.max_length))
    mixed = config.precision == "bf16-mixed"

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        del loss
        trained = [p for p in model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(trained, config.clip or float("inf"))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()

    scheduler: LayerScheduler | None = None
    with ExitStack() as stack:
        if setting.lora_rank is None:
            scheduler = stack.enter_context(schedule_given(model, optimizer, config, setting.active))
        stack.enter_context(
            save_memory(
                model,
                loss_chunk=config.chunk_positions,
                recompute=config.recompute,
                gradient_checkpointing=config.gradient_checkpointing,
            )
        )
        step()
        codes = scheduler.frozen.tensors if scheduler is not None and scheduler.frozen is not None else ()
        return int(measured_step_peak(model, [*optimizer_tensors(optimizer), *codes], step))


def measure(settings: Sequence[Setting], model: str) -> list[dict[str, Any]]:
    """Plan and run each setting."""
    rows = []
    for setting in settings:
        config = TrainConfig(**setting.options)
        planned = simulate_step(load_shape(model), config, setting.active, lora_rank=setting.lora_rank)
        measured = run_setting(setting, model)
        rows.append(
            {
                "setting": setting.name,
                "tokens": f"{config.batch_size} × {config.max_length}",
                "planned_bytes": planned.peak_bytes,
                "measured_bytes": measured,
                "off": planned.peak_bytes / measured - 1,
                "parts": planned.parts,
            }
        )
    return rows


def main(
    model: Annotated[str, typer.Option(help="Built-in shape or folder.")] = "smollm2-135m",
    only: Annotated[str, typer.Option(help="Settings with this in their name alone.")] = "",
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Plan and run every setting, print the table, and store it."""
    rows = measure([setting for setting in SETTINGS if only in setting.name], model)
    store(
        output,
        "plan_check",
        {"model": model, "rows": rows},
        title="Plans and what steps take",
        about=f"{model}, random weights; peak bytes of a step once optimizer state is there. Measured: what "
        "torch's allocator reports, and the weights and state that stood before.",
        command="plan_check",
        headings=("setting", "tokens", "planned", "measured", "off by"),
        rows=[_cells(row) for row in rows],
    )


def _cells(row: dict[str, Any]) -> list[str]:
    sizes = [f"{row[key] / 2**20:,.0f} MiB" for key in ("planned_bytes", "measured_bytes")]
    return [row["setting"], row["tokens"], *sizes, f"{row['off']:+.1%}"]


if __name__ == "__main__":
    typer.run(main)
