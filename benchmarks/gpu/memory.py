"""Peak memory of a step beside its plan, in settings from full fine-tuning to the smallest preset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from layersample.activations.save_memory import save_memory
from layersample.config import TrainConfig, make_config, read_preset
from layersample.optim.memory_use import optimizer_tensors
from layersample.planning.active_sets import find_active_sets
from layersample.planning.fake_models import add_lora
from layersample.planning.simulation import schedule_given, simulate_step

from ..measured_peak import measured_step_peak
from .bench import Bench, Row, loss_of

BOUND = 0.05
_AS_COMMON = {"loss_chunk": None, "recompute": False, "master_weights": False, "gradient_checkpointing": True}
_BF16 = {"precision": "bf16", "batch_size": 1, "max_length": 1024}


@dataclass(frozen=True)
class Setting:
    """A run whose step is planned and measured.

    Args:
        name: Of the row.
        model: Built-in shape.
        preset: Name of a preset, if any.
        options: Options beside it.
        lora_rank: Rank of a LoRA in place of layers.
    """

    name: str
    model: str
    preset: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    lora_rank: int | None = None

    def config(self, bench: Bench) -> TrainConfig:
        """Its options; at the tiny scale with few tokens and layers, and a rank below the width."""
        options = {**(read_preset(self.preset) if self.preset else {}), **self.options}
        if bench.tiny:
            options |= {"max_length": 64, "num_active": min(options.get("num_active", 2), 2)}
            options |= {"rank": 8} if options.get("projection") else {}
        return make_config((self.name, options))


SETTINGS = (
    Setting("--preset lisa-7b", "llama-2-7b", "lisa-7b"),
    Setting("--preset owlore-16gb", "llama-2-7b", "owlore-16gb"),
    Setting("--preset smallest", "llama-2-7b", "smallest"),
    Setting("--preset lisa-7b", "qwen2.5-3b", "lisa-7b"),
    Setting("--preset lisa-7b, fp32 masters", "tinyllama-1.1b", "lisa-7b", {"master_weights": True}),
    Setting("--preset lisa-7b, state kept", "tinyllama-1.1b", "lisa-7b", {"state": "keep"}),
    Setting("LISA, mixed precision", "tinyllama-1.1b", None, {**_BF16, "precision": "bf16-mixed"}),
    Setting("LISA as commonly run", "tinyllama-1.1b", None, {**_BF16, **_AS_COMMON, "state": "keep"}),
    Setting(
        "GaLore, rank 128",
        "tinyllama-1.1b",
        None,
        {**_BF16, **_AS_COMMON, "sampler": "full", "projection": "galore", "rank": 128},
    ),
    Setting("full fine-tuning", "tinyllama-1.1b", None, {**_BF16, **_AS_COMMON, "sampler": "full"}),
    Setting("LoRA, rank 16", "tinyllama-1.1b", None, {**_BF16, **_AS_COMMON}, lora_rank=16),
    Setting("full fine-tuning", "llama-2-7b", None, {**_BF16, **_AS_COMMON, "sampler": "full"}),
    Setting("--preset lisa-70b", "llama-2-70b", "lisa-70b"),
)


def measure(bench: Bench) -> Iterator[Row]:
    """Plan and run every setting that the device has room for."""
    for setting in SETTINGS:
        name = f"{setting.name}, {setting.model}"
        if setting.lora_rank is not None and find_spec("peft") is None:
            yield Row("peak memory", name, "", "", "not available", {"needs": "peft"})
            continue
        config, shape = setting.config(bench), bench.shape(setting.model)
        sets = find_active_sets(shape, config)
        active = () if setting.lora_rank is not None else sets.worst[0]
        planned = simulate_step(shape, config, active, lora_rank=setting.lora_rank).peak_bytes
        claimed = _size(planned)
        if bench.on_gpu and planned + 2**30 > torch.cuda.mem_get_info()[0]:
            yield Row("peak memory", name, "", claimed, "not available", {"needs": f"a card for {claimed}"})
            continue
        measured, reserved = _run(bench, shape, config, active, setting.lora_rank)
        bench.release()
        figures = {"planned_bytes": planned, "measured_bytes": measured, "reserved_bytes": reserved}
        if not bench.on_gpu:
            yield Row("peak memory", name, _size(measured), claimed, "measured", figures)
            continue
        verdict = "met" if abs(measured / planned - 1) <= BOUND else "MISS"
        found = f"{_size(measured)}, {measured / planned - 1:+.1%}; {_size(reserved or 0)} reserved"
        yield Row("peak memory", name, found, claimed, verdict, figures)  # type: ignore[arg-type]


def _run(
    bench: Bench, shape: Any, config: TrainConfig, active: tuple[int, ...], lora_rank: int | None
) -> tuple[int, int | None]:
    """Bytes at the peak of a step once state is there, and bytes that the allocator then reserves on a GPU."""
    model = bench.model(shape, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    if lora_rank is not None:
        model = add_lora(model, lora_rank)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5, fused=True)
    scheduler = None if lora_rank is not None else schedule_given(model, optimizer, config, active)
    saver = save_memory(
        model,
        loss_chunk=config.chunk_positions,
        recompute=config.recompute,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    tokens = bench.tokens(shape, config.batch_size, config.max_length)
    mixed = config.precision.endswith("mixed")

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=mixed):
            loss = loss_of(model, tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        if config.clip and not config.step_in_backward:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], config.clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()

    with saver:
        step()
        if not bench.on_gpu:
            return measured_step_peak(model, optimizer_tensors(optimizer), step), None
        torch.cuda.reset_peak_memory_stats()
        step()
        bench.wait()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"
