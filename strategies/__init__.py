"""The samplers that come with layersample, one a file; each uses the public interface alone."""

from layersample_strategies.cyclic import Cyclic
from layersample_strategies.full import Full
from layersample_strategies.lisa import Lisa

__all__ = ["Cyclic", "Full", "Lisa"]
