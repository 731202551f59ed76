from __future__ import annotations

import torch
from torch import nn

from layersample import measure_memory
from layersample.optim.memory_use import count_bytes
from tests.helpers import make_llama


def test_counts_a_known_model_exactly() -> None:
    model = nn.Linear(10, 5)  # 55 numbers
    optimizer = torch.optim.AdamW(model.parameters())
    assert vars(measure_memory(model, optimizer)) == {
        "weights": 220,
        "gradients": 0,
        "optimizer_state": 0,
        "offloaded_state": 0,
        "master_weights": 0,
        "master_remainders": 0,
        "host_weights": 0,
    }
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    use = measure_memory(model, optimizer)
    assert use.gradients == 220
    assert use.optimizer_state == 2 * 220 + 2 * 4  # two moments, and a step counter for each tensor


def test_tied_weights_count_once() -> None:
    tied, untied = make_llama(tie=True), make_llama()
    optimizer = torch.optim.SGD(tied.parameters())
    embedding = tied.model.embed_tokens.weight
    difference = measure_memory(untied, optimizer).weights - measure_memory(tied, optimizer).weights
    assert difference == embedding.numel() * 4


def test_views_of_one_storage_count_once() -> None:
    whole = torch.zeros(100)
    assert count_bytes([whole, whole[:50], whole.view(10, 10)]) == 400
