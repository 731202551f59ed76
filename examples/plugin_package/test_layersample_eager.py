"""The tests that every sampler passes; run by `pytest` once the package is installed."""

from __future__ import annotations

from layersample import LayerSampler, create_sampler
from layersample.testing import SamplerContract


class TestEager(SamplerContract):
    """By its name, which the entry point gives it."""

    def make(self) -> LayerSampler:
        """Return a new sampler."""
        return create_sampler("eager")
