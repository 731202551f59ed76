"""FSDP2 (``fully_shard``): flipping ``requires_grad`` works, once its traps are known."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from layersample.engine import Engine
from layersample.errors import ConfigError
from layersample.sampler import LayerSampler
from layersample.weighted import MeasuredSampler


class FSDPEngine(Engine):
    """A model whose layers, and itself, were given to ``fully_shard``.

    Frozen layers skip reduce-scatter by themselves. A unit notes the dtype of its gradients when the model
    first runs, from the parameters that require one then; a unit that is frozen at that time notes none, and
    its first backward under mixed precision fails (pytorch issue 186998). So that is brought forward.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # Of units in one another the outermost is the root: where the model itself isn't sharded, there are several.
        units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        self._roots = [name for name in units if not any(_inside(name, other) for other in units)]

    def prepare(self) -> None:
        """Have FSDP note dtypes while all parameters require a gradient."""
        for name in self._roots:
            root = self.model.get_submodule(name)
            assert isinstance(root, FSDPModule)
            root._get_fsdp_state()._lazy_init()

    def must_measure(self, sampler: LayerSampler) -> bool:
        """No sampler can measure here: each rank holds a shard of every weight.

        Raises:
            ConfigError: If it measures the model and hasn't yet, or measures again and again.
        """
        measures = type(sampler).measure is not LayerSampler.measure
        has_measured = isinstance(sampler, MeasuredSampler) and bool(sampler.scores)
        if measures and (sampler.measure_every is not None or not has_measured):
            raise ConfigError(
                f"{type(sampler).__name__} must measure the model once, before fully_shard cuts every weight into "
                "shards. On the whole model: sampler = create_sampler(...), then LayerScheduler(model, optimizer, "
                "sampler, ...).close(). Then shard the model, build its optimizer, and give the same sampler to "
                "their LayerScheduler."
            )
        return False

    @property
    def groups(self) -> list[dist.ProcessGroup | None]:
        """The groups of each dimension of the mesh: two where shards are replicated (HSDP)."""
        return list(self._mesh.get_all_groups())

    @property
    def device(self) -> torch.device:
        """The mesh's kind of device: with CPU offload the parameters aren't where gradients are reduced."""
        return torch.device(self._mesh.device_type)

    @property
    def _mesh(self) -> dist.DeviceMesh:
        mesh = next(p.device_mesh for p in self.model.parameters() if hasattr(p, "device_mesh"))
        assert isinstance(mesh, dist.DeviceMesh)
        return mesh


def _inside(name: str, other: str) -> bool:
    return name != other and (other == "" or name.startswith(other + "."))
