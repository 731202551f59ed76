"""Where the measurements run, at what scale, and how they time and count there."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from layersample.planning.shapes import load_shape

Verdict = Literal["met", "MISS", "measured", "no meaning", "not available", "FAILED"]
"""``no meaning``: on this device the figure would say nothing, and isn't given. ``FAILED``: an error ended it."""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        measurement: What was measured.
        setting: In what setting.
        found: What came out, with its unit; empty where nothing could be measured.
        claimed: What was planned or claimed, with its unit; empty where nothing is.
        verdict: What follows.
        figures: The numbers behind it, for the JSON.
    """

    measurement: str
    setting: str
    found: str
    claimed: str
    verdict: Verdict
    figures: dict[str, Any]


Job = Callable[[], Iterable[Row]]
"""A part of a measurement that is stored as a whole: it is run again if it was cut off."""


@dataclass(frozen=True)
class Bench:
    """A device and a scale.

    Args:
        device: Where it runs.
        tiny: Models of four small layers, so that every line runs in about a minute; else those of the plan.
    """

    device: torch.device
    tiny: bool

    @property
    def on_gpu(self) -> bool:
        """Whether figures of a GPU can be had."""
        return self.device.type == "cuda"

    def shape(self, name: str) -> PretrainedConfig:
        """A built-in shape; at the tiny scale, a Llama of four layers in its place."""
        if not self.tiny:
            return load_shape(name)
        return LlamaConfig(
            vocab_size=260,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=257,
            eos_token_id=258,
            pad_token_id=259,
        )

    def model(self, shape: PretrainedConfig, dtype: torch.dtype) -> Any:
        """The model of a shape, with random weights of a fixed seed, on the device and ready to train."""
        torch.manual_seed(0)
        with self.device:
            return AutoModelForCausalLM.from_config(shape, dtype=dtype).train()

    def tokens(self, shape: PretrainedConfig, batch: int, length: int, seed: int = 0) -> Tensor:
        """Random tokens of a fixed seed, ``(batch, length)``."""
        generator = torch.Generator().manual_seed(seed)
        most = min(shape.get_text_config().vocab_size, 1000)
        return torch.randint(0, most, (batch, length), generator=generator).to(self.device)

    def wait(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], object]) -> float:
        """Seconds of a function: by CUDA events on a GPU, and by the clock elsewhere."""
        if not self.on_gpu:
            return self.clock(function)
        self.wait()
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def clock(self, function: Callable[[], object]) -> float:
        """Seconds of a function by the host's clock, from one standstill of the device to the next."""
        self.wait()
        started = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - started

    def release(self) -> None:
        """Give back what no tensor holds any more."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """The loss of a batch without padding."""
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss
