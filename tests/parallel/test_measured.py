from __future__ import annotations

from typing import Any

from layersample import create_sampler
from layersample.parallel.measured import recall, remember
from tests.helpers import make_llama


def test_what_was_measured_is_for_a_sampler_of_the_same_options() -> None:
    """A run with others on the same model would go by scores that it never asked for."""
    model, top = make_llama(), {"choose": "top"}
    first: Any = create_sampler("spectrum", top)
    first.scores = {"model.layers.0": 1.0}
    remember(model, first, first.state_dict())
    again: Any = create_sampler("spectrum", top)
    assert recall(model, again) and again.scores == first.scores
    other: Any = create_sampler("spectrum", {"choose": "draw"})
    assert not recall(model, other) and not other.scores
    assert not recall(model, create_sampler("owlore")) and not recall(make_llama(), again)
