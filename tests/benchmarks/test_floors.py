from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from layersample.config import TrainConfig
from layersample.planning.shapes import load_shape
from layersample.planning.simulation import simulate_step
from layersample_benchmarks.floor_check import CHUNKS, OURS
from layersample_benchmarks.floors import flop_floor, memory_floor
from tests.helpers import make_llama

CONFIG = make_llama(6, tie=True).config


def count(active: tuple[int, ...], embedding: bool) -> int:
    """FLOPs of a real step, as torch counts them."""
    model = make_llama(6, tie=True).train().requires_grad_(False)
    model.set_attn_implementation("eager")  # whose products torch counts
    for index in active:
        model.model.layers[index].requires_grad_(True)
    model.model.embed_tokens.requires_grad_(embedding)
    tokens = torch.randint(0, 200, (2, 48))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("active", "embedding"), [((4, 5), False), ((1, 3), False), ((2,), True)])
def test_the_flop_floor_is_what_torch_counts(active: tuple[int, ...], embedding: bool) -> None:
    share = count(active, embedding) / count(tuple(range(6)), True)
    floor = flop_floor(CONFIG, 2, 48, active, embedding=embedding)
    assert floor == pytest.approx(share, abs=0.02)  # the lowest layer needs no gradient of its input


@pytest.mark.parametrize(("precision", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_a_step_stays_just_above_the_memory_floor(precision: str, itemsize: int) -> None:
    shape = load_shape("smollm2-135m")
    assert isinstance(shape, LlamaConfig)
    floor = memory_floor(shape, 4, 128, (9, 20), itemsize=itemsize)
    config = TrainConfig(
        **OURS, loss_chunk=CHUNKS[precision], precision=precision, batch_size=4, max_length=128
    )
    assert 1 <= simulate_step(shape, config, (9, 20)).peak_bytes / floor <= 1.1
