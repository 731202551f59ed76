from __future__ import annotations

import logging

import pytest
import torch

from layersample import LayerScheduler
from layersample.sampling.pace import pace, paced
from tests.helpers import make_batch, make_llama


def test_says_before_the_first_and_after_it() -> None:
    said: list[str] = []
    items = paced(iter(range(10)), "Reading", 3, said.append)
    assert said == []
    assert next(items) == 0 and said == ["Reading: up to 3."]
    assert list(items) == [1, 2]
    assert len(said) == 2 and said[1].startswith("Reading: the first took ")
    assert "the other 2 may take" in said[1]


def test_no_more_is_read_than_is_asked_for() -> None:
    source = iter(range(10))
    assert list(paced(source, "Reading", 3, lambda text: None)) == [0, 1, 2]
    assert next(source) == 3


def test_says_once_that_a_tenth_is_done() -> None:
    said: list[str] = []
    progress = pace("Measuring", said.append)
    for done in range(1, 21):
        progress(done, 20)
    assert len(said) == 1 and said[0].startswith("Measuring: 2 of 20 are done, the rest may take ")
    few: list[str] = []
    pace("Measuring", few.append)(1, 1)
    assert few == []


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize(
    ("sampler", "options", "what"),
    [
        ("owlore", {"num_batches": 2, "threshold": 3.0}, "Counting outliers, batches: up to 2."),
        ("owlore", {"metric": "hill"}, "Spectra of the layers' matrices: "),
        ("lora_norm", {"probe_steps": 2}, "Training a LoRA to see its norms, steps: up to 2."),
    ],
)
def test_every_measurement_says_how_long_it_takes(
    sampler: str, options: dict[str, object], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "layersample.progress")
    model = make_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    with LayerScheduler(
        model,
        optimizer,
        sampler,
        sampler_options=options,
        num_active=1,
        batches=[make_batch(0), make_batch(1)],
    ):
        said = [record.getMessage() for record in caplog.records if record.name == "layersample.progress"]
    assert any(text.startswith(what) for text in said)
    assert any("may take" in text for text in said)
