"""The public names, in one place: __init__.py imports each when it is first used."""

from . import metrics as metrics
from .activations.chunked_loss import ChunkedLoss as ChunkedLoss
from .activations.recompute import SelectiveRecompute as SelectiveRecompute
from .checkpoints.sharded import load_distributed as load_distributed
from .checkpoints.sharded import save_distributed as save_distributed
from .checkpoints.whole import Checkpoints as Checkpoints
from .config import TrainConfig as TrainConfig
from .errors import ConfigError as ConfigError
from .integrations.transformers import LayerSamplingCallback as LayerSamplingCallback
from .layers.costs import LayerCosts as LayerCosts
from .layers.costs import layer_costs as layer_costs
from .layers.find import Layer as Layer
from .layers.find import ModelLayers as ModelLayers
from .layers.find import find_layers as find_layers
from .optim.memory_use import MemoryUse as MemoryUse
from .optim.memory_use import measure_memory as measure_memory
from .optim.step_in_backward import StepInBackward as StepInBackward
from .planning.budget import choose_num_active as choose_num_active
from .planning.planner import plan as plan
from .profiling.profile import profile as profile
from .projection.projection import LowRankStep as LowRankStep
from .projection.projection import Projection as Projection
from .projection.projection import ProjectionContext as ProjectionContext
from .projection.projection import Side as Side
from .registry import create_projection as create_projection
from .registry import create_sampler as create_sampler
from .registry import list_projections as list_projections
from .registry import list_samplers as list_samplers
from .registry import load_plugin as load_plugin
from .registry import register as register
from .registry import register_projection as register_projection
from .registry import register_sampler as register_sampler
from .sampling.draws import Draw as Draw
from .sampling.sampler import LayerSampler as LayerSampler
from .sampling.sampler import LayerStatistics as LayerStatistics
from .sampling.sampler import Measurement as Measurement
from .sampling.sampler import SamplingContext as SamplingContext
from .sampling.weighted import Cost as Cost
from .sampling.weighted import MeasuredSampler as MeasuredSampler
from .sampling.weighted import WeightedSampler as WeightedSampler
from .scheduling.scheduler import LayerScheduler as LayerScheduler
from .training.finetune import finetune as finetune

__version__: str
