"""The samplers and projections that come with layersample, one a file; each uses the public interface alone."""

from layersample_strategies.adagradselect import AdaGradSelect
from layersample_strategies.apollo import Apollo
from layersample_strategies.bandit import Bandit
from layersample_strategies.blockllm import BlockLLM
from layersample_strategies.cyclic import Cyclic
from layersample_strategies.fira import Fira
from layersample_strategies.freeze_converged import FreezeConverged
from layersample_strategies.full import Full
from layersample_strategies.galore import GaLore
from layersample_strategies.grass import Grass
from layersample_strategies.gum import Gum
from layersample_strategies.ist import Ist
from layersample_strategies.lisa import Lisa
from layersample_strategies.lora_norm import LoraNorm
from layersample_strategies.max_wait import MaxWait
from layersample_strategies.misa import Misa
from layersample_strategies.mixture import Mixture
from layersample_strategies.owlore import OwLore
from layersample_strategies.prior import Prior
from layersample_strategies.spectrum import Spectrum
from layersample_strategies.warmup import Warmup

__all__ = [
    "AdaGradSelect",
    "Apollo",
    "Bandit",
    "BlockLLM",
    "Cyclic",
    "Fira",
    "FreezeConverged",
    "Full",
    "GaLore",
    "Grass",
    "Gum",
    "Ist",
    "Lisa",
    "LoraNorm",
    "MaxWait",
    "Misa",
    "Mixture",
    "OwLore",
    "Prior",
    "Spectrum",
    "Warmup",
]
