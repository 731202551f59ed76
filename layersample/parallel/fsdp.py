"""Sharded models: FSDP2 (``fully_shard``), and FullyShardedDataParallel (FSDP1) with the original parameters."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from layersample.errors import ConfigError
from layersample.parallel.base import Engine
from layersample.parallel.measured import recall
from layersample.sampling.sampler import LayerSampler


class ShardedEngine(Engine):
    """A model of whose weights each rank holds a part."""

    is_sharded = True

    def check_frozen_weights(self) -> None:
        """Shards can't be rounded.

        Raises:
            ConfigError: Always; it says what else there is.
        """
        raise ConfigError(
            "frozen_weights needs whole weights on each rank, but the model is sharded: leave it out and give "
            "fully_shard an offload_policy=CPUOffloadPolicy(), which keeps all weights exact in the host's memory; or "
            "use DistributedDataParallel."
        )

    def check_branches(self) -> None:
        """What a projection leaves out of a shard isn't worked out here.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "A sampler that takes what a projection leaves out needs whole gradients, but the model is sharded: use "
            "DistributedDataParallel."
        )

    def check_step_in_backward(self, option: str = "step_in_backward") -> None:
        """Gradients of shards aren't there when backward has made those of the whole weights.

        Args:
            option: The option that needs them.

        Raises:
            ConfigError: Always, on one rank too.
        """
        raise ConfigError(
            "A step in the backward pass needs gradients that are whole there, but the model is sharded, and its "
            f"shards get theirs later: leave {option} out."
        )

    def must_measure(self, sampler: LayerSampler) -> bool:
        """No sampler can measure here: each rank holds a shard of every weight. But one may have before.

        Raises:
            ConfigError: If it measures the model and hasn't yet, or measures again and again.
        """
        once = sampler.measure_every is None
        if sampler.measures and not (once and (sampler.has_measured or recall(self.model, sampler))):
            raise ConfigError(
                f"{type(sampler).__name__} must measure the model once, before its weights are cut into shards. On "
                "the whole model: sampler = create_sampler(...), then LayerScheduler(model, optimizer, sampler, "
                "...).close(). Then shard the model, build its optimizer, and give the same sampler to their "
                "LayerScheduler."
            )
        return False


class FSDPEngine(ShardedEngine):
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

    def sum_over_shards(self, squares: torch.Tensor) -> torch.Tensor:
        """Add up what the ranks hold; the last dimension of the mesh is that of the shards, also under HSDP."""
        total = squares.to(self.device, copy=True)
        dist.all_reduce(total, group=self._mesh.get_group(self._mesh.ndim - 1))
        return total

    @property
    def groups(self) -> list[dist.ProcessGroup | None]:
        """The groups of each dimension of the mesh: two where shards are replicated (HSDP)."""
        return list(self._mesh.get_all_groups())

    @property
    def device(self) -> torch.device:
        """The mesh's kind of device: with CPU offload the parameters aren't where gradients are reduced."""
        return torch.device(self._mesh.device_type)

    @property
    def _mesh(self) -> DeviceMesh:
        mesh = next(p.device_mesh for p in self.model.parameters() if hasattr(p, "device_mesh"))
        assert isinstance(mesh, DeviceMesh)
        return mesh


class FSDP1Engine(ShardedEngine):
    """A model inside of FullyShardedDataParallel, which looks at ``requires_grad`` in each forward by itself.

    Args:
        model: The model with its wrappers.

    Raises:
        ConfigError: If a wrapper has ``use_orig_params=False``: its layers are one flat parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        wrappers = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
        if not all(wrapper._use_orig_params for wrapper in wrappers):
            raise ConfigError(
                "FullyShardedDataParallel must be made with use_orig_params=True (fsdp_use_orig_params: true for "
                "accelerate), because without it a unit has one flat parameter that can't be frozen in part. Or use "
                "FSDP2: torch.distributed.fsdp.fully_shard, fsdp_version: 2 for accelerate."
            )
        self._wrapper = wrappers[0]

    def prepare(self) -> None:
        """Nothing to do."""

    def check_gradient_norms(self) -> None:
        """A rank doesn't know how large the parts are that others hold.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "A sampler that learns from gradients needs FSDP2 (torch.distributed.fsdp.fully_shard, fsdp_version: 2 "
            "for accelerate), but the model is inside of FullyShardedDataParallel."
        )

    def check_sizes(self) -> None:
        """A rank doesn't know how large the parts are that others hold.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "draw_budget needs FSDP2 (torch.distributed.fsdp.fully_shard, fsdp_version: 2 for accelerate), but the "
            "model is inside of FullyShardedDataParallel: give num_active."
        )

    @property
    def groups(self) -> list[dist.ProcessGroup | None]:
        """The ranks that hold the shards."""
        return [self._wrapper.process_group]

    @property
    def device(self) -> torch.device:
        """Where gradients are reduced: with CPU offload the parameters are elsewhere."""
        device = self._wrapper.compute_device
        assert device is not None  # set when it was made
        return device


def _inside(name: str, other: str) -> bool:
    return name != other and (other == "" or name.startswith(other + "."))
