"""Peak memory of a step beside its plan, in settings from full fine-tuning to the smallest preset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from layersample.activations.save_memory import save_memory
from layersample.config import TrainConfig, make_config, read_preset
from layersample.frozen.exact import available_memory
from layersample.optim.memory_use import optimizer_tensors
from layersample.planning.active_sets import find_active_sets
from layersample.planning.fake_models import add_lora
from layersample.planning.simulation import StepMemory, schedule_given, simulate_step
from layersample.unwrapping import FROZEN

from ..measured_peak import measured_step_peak
from .bench import Bench, Job, Row, loss_of

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

    @property
    def needs(self) -> str | None:
        """The package that it needs and that isn't installed."""
        needed = ["peft"] if self.lora_rank is not None else []
        preset = read_preset(self.preset) if self.preset else {}
        if {**preset, **self.options}.get("frozen_weights") == "nf4":
            needed.append("bitsandbytes")
        return next((package for package in needed if find_spec(package) is None), None)


SETTINGS = (
    Setting("--preset lisa-7b", "llama-2-7b", "lisa-7b"),
    Setting("--preset owlore-16gb", "llama-2-7b", "owlore-16gb"),
    Setting("--preset smallest", "llama-2-7b", "smallest"),
    Setting("--preset lisa-8gb", "llama-2-7b", "lisa-8gb"),
    Setting("--preset lisa-8gb, frozen weights int8", "llama-2-7b", "lisa-8gb", {"frozen_weights": "int8"}),
    Setting("--preset lisa-12gb", "llama-2-7b", "lisa-12gb"),
    Setting("--preset lisa-7b", "qwen2.5-3b", "lisa-7b"),
    Setting(
        "--preset lisa-7b, frozen weights nf4, fp32 masters",
        "qwen2.5-3b",
        "lisa-7b",
        {"frozen_weights": "nf4", "master_weights": True},
    ),
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
    Setting("--preset lisa-48gb", "llama-2-70b", "lisa-48gb"),
)


def jobs(bench: Bench) -> dict[str, Job]:
    """A job for each setting."""
    return {_name(setting): partial(_measure, bench, setting) for setting in SETTINGS}


def _name(setting: Setting) -> str:
    return f"{setting.name}, {setting.model}"


def _measure(bench: Bench, setting: Setting) -> Iterator[Row]:
    """Plan a setting, and run it where there is room for it."""
    name = _name(setting)
    if setting.needs is not None:
        yield Row("peak memory", name, "", "", "not available", {"needs": setting.needs})
        return
    config, shape = setting.config(bench), bench.shape(setting.model)
    sets = find_active_sets(shape, config)
    active = () if setting.lora_rank is not None else sets.worst[0]
    plan = simulate_step(shape, config, active, lora_rank=setting.lora_rank)
    planned, claimed = plan.peak_bytes, _size(plan.peak_bytes)
    if (lacking := _no_room(bench, plan, sets.parameters)) is not None:
        yield Row("peak memory", name, "", claimed, "not available", {"needs": lacking})
        return
    before = torch.cuda.memory_allocated() if bench.on_gpu else 0
    measured, reserved = _run(bench, shape, config, active, setting.lora_rank)
    figures = {
        "planned_bytes": planned,
        "planned_parts": plan.parts,
        "measured_bytes": measured,
        "reserved_bytes": reserved,
        "held_before_bytes": before,
    }
    if not bench.on_gpu:
        yield Row("peak memory", name, _size(measured), claimed, "measured", figures)
        return
    verdict = "met" if abs(measured / planned - 1) <= BOUND else "MISS"
    found = f"{_size(measured)}, {measured / planned - 1:+.1%}; {_size(reserved or 0)} reserved"
    yield Row("peak memory", name, found, claimed, verdict, figures)  # type: ignore[arg-type]


def _no_room(bench: Bench, plan: StepMemory, parameters: int) -> str | None:
    """What a setting needs and the device or the host hasn't, in words.

    The device must also hold the whole model for a moment: it is made there, and then rounded.
    """
    if not bench.on_gpu:
        return None
    needed = max(plan.peak_bytes, 2 * parameters)
    if needed + 2**30 > torch.cuda.mem_get_info()[0]:
        return f"a card for {_size(needed)}"
    there = available_memory()
    # Pinned memory is taken in powers of two.
    if there is not None and 2 * plan.host_bytes > there:
        return f"a host for {_size(2 * plan.host_bytes)}"
    return None


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
            rounded = [frozen for p in model.parameters() if (frozen := getattr(p, FROZEN, None)) is not None]
            codes = [tensor for frozen in rounded for tensor in frozen.tensors]
            return measured_step_peak(model, [*optimizer_tensors(optimizer), *codes], step), None
        bench.release()  # what the making of the model has left to the allocator
        torch.cuda.reset_peak_memory_stats()
        step()
        bench.wait()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"
