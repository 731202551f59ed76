"""The tests that every sampler and every projection passes, ours and yours: subclass the contract in a test file.

:class:`SamplerContract` is for samplers, :class:`ProjectionContract` for low-rank projections.
"""

from layersample.testing.projections import ProjectionContract
from layersample.testing.samplers import SamplerContract

__all__ = ["ProjectionContract", "SamplerContract"]
