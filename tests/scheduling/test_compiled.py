"""Compiled layers train as plain ones: dynamo must notice that nothing but ``requires_grad`` has changed."""

from __future__ import annotations

import os

import pytest
import torch

from layersample import LayerScheduler
from tests.helpers import Given, make_batch, make_llama, weights_of

INDUCTOR = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(
        "LAYERSAMPLE_TEST_INDUCTOR" not in os.environ,
        reason="minutes of compiling; `.ci/versions SET --fresh` runs it",
    ),
)


def train(backend: str | None) -> dict[str, torch.Tensor]:
    """Weights after seven periods of one step; each layer is switched on and off, and on again."""
    torch._dynamo.reset()
    model = make_llama(3).train()
    for layer in model.model.layers if backend else ():
        layer.compile(backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sets = Given((2,), (1,), (0,), (2,), (0, 2), (1,), (0, 1))
    with LayerScheduler(
        model, optimizer, sets, num_active=1, period=1, embeddings="freeze", check=True
    ) as scheduler:
        for step in range(7):
            model(**make_batch(step), use_cache=False).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    torch._dynamo.reset()
    return weights_of(model)


@pytest.mark.filterwarnings("ignore")  # dynamo looks at .grad, and inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_compiled_layers_that_are_switched_on_train_as_plain_ones(backend: str) -> None:
    plain, compiled = train(None), train(backend)
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-4, atol=1e-5)
