"""The samplers and projections that come with layersample, one a file; each uses the public interface alone."""

from layersample_strategies.apollo import Apollo
from layersample_strategies.bandit import Bandit
from layersample_strategies.cyclic import Cyclic
from layersample_strategies.fira import Fira
from layersample_strategies.full import Full
from layersample_strategies.galore import GaLore
from layersample_strategies.grass import Grass
from layersample_strategies.lisa import Lisa
from layersample_strategies.lora_norm import LoraNorm
from layersample_strategies.owlore import OwLore
from layersample_strategies.prior import Prior

__all__ = [
    "Apollo",
    "Bandit",
    "Cyclic",
    "Fira",
    "Full",
    "GaLore",
    "Grass",
    "Lisa",
    "LoraNorm",
    "OwLore",
    "Prior",
]
