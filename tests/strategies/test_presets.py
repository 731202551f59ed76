"""Presets reach what their comments promise: peaks of plans, in GiB, for the worst set of layers."""

from __future__ import annotations

import pytest

from layersample import create_sampler
from layersample.config import make_config, read_preset
from layersample.planning.planner import plan
from layersample.plugins import settings_files


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("model", "preset", "most"),
    [
        ("llama-2-7b", "lisa-7b", 16.0),
        ("llama-2-7b", "owlore-16gb", 14.8),
        ("llama-2-7b", "smallest", 13.2),
        ("llama-2-70b", "lisa-70b", 134.0),
        ("llama-2-7b", "lisa-8gb", 6.3),
        ("llama-2-7b", "lisa-12gb", 7.4),
        ("llama-2-70b", "lisa-48gb", 45.5),
    ],
)
def test_presets_fit_their_card(model: str, preset: str, most: float) -> None:
    config = make_config((preset, read_preset(preset)))
    assert plan(model, config, baselines=False).peak_bytes <= most * 2**30


@pytest.mark.parametrize("name", sorted(settings_files("presets")))
def test_every_preset_names_its_source_and_makes_its_sampler(name: str) -> None:
    text = settings_files("presets")[name]
    assert text.startswith("# ")
    config = make_config((name, read_preset(name)))
    assert isinstance(config.sampler, str)
    create_sampler(config.sampler, config.sampler_options)
