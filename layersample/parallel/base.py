"""What spreads a model over processes, and what it must be told when other layers begin to train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from layersample.errors import ConfigError
from layersample.parallel.agreement import agree, check_agreement, is_distributed
from layersample.sampling.sampler import LayerSampler

NO_DATA_PARALLEL = (
    "The model must not run in nn.DataParallel, because that runs copies of it, which what is attached to the model "
    "itself doesn't reach: start a process for each GPU with torchrun, or set CUDA_VISIBLE_DEVICES=0."
)


class Engine:
    """A model in one process, or in several that don't spread it: nothing to tell it but who agrees.

    Args:
        model: The model without its wrappers.
    """

    is_sharded: ClassVar[bool] = False
    """Whether each rank holds a part of every weight."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._num_trainable = 0
        self._handle: RemovableHandle | None = None

    def prepare(self) -> None:
        """Called once, while every parameter that may ever train requires a gradient."""
        self._num_trainable = sum(parameter.requires_grad for parameter in self.model.parameters())
        if is_distributed():
            self._handle = self.model.register_forward_pre_hook(self._refuse_unknown_wrapper)

    def switched(self, active: Sequence[str], round: int) -> None:
        """Called when other parameters require a gradient than before, before the next forward.

        Args:
            active: Names of the layers that train now.
            round: Number of the period.

        Raises:
            ConfigError: If the ranks don't agree on them.
        """
        for group in self.groups:
            check_agreement(active, round=round, device=self.device, group=group)

    def agree(self, answer: bool, what: str) -> bool:
        """Make sure that all ranks answer a question alike.

        Args:
            answer: This rank's.
            what: The question, for messages.

        Raises:
            ConfigError: On every rank, if they don't.
        """
        for group in self.groups:
            agree(answer, what, device=self.device, group=group)
        return answer

    def check_step_in_backward(self, option: str = "step_in_backward") -> None:
        """Whether gradients are whole as soon as backward has made them.

        Args:
            option: The option that needs it.

        Raises:
            ConfigError: If other ranks add to them after that.
        """
        if is_distributed():
            raise ConfigError(
                "A step in the backward pass needs gradients that are whole there, but those of several processes "
                f"are added up later: leave {option} out."
            )

    def check_probe(self) -> None:
        """Whether gradients can be looked at without a step.

        Raises:
            ConfigError: If other ranks hold parts of them, or add to them.
        """
        if is_distributed():
            raise ConfigError(
                "A probe of gradients needs a single process, but there are several: choose probe_batches=0, where "
                "the first periods tell the same."
            )

    def check_frozen_weights(self) -> None:
        """Whether each rank has whole weights, which can be rounded.

        Raises:
            ConfigError: If it has parts of them.
        """

    def must_measure(self, sampler: LayerSampler) -> bool:
        """Whether a sampler may look at the model now; False if it has done so already, and can't again.

        Raises:
            ConfigError: If it must, but can't.
        """
        return True

    def check_gradient_norms(self) -> None:
        """Whether the norm of a layer's gradient can be known.

        Raises:
            ConfigError: If ranks hold parts of it that can't be told apart.
        """

    def check_branches(self) -> None:
        """Whether what a projection leaves out of a gradient is known.

        Raises:
            ConfigError: If each rank holds a part of the gradient.
        """

    def check_sizes(self) -> None:
        """Whether the size of each parameter is known.

        Raises:
            ConfigError: If ranks hold parts of it, and each knows its own alone.
        """

    def sum_over_shards(self, squares: torch.Tensor) -> torch.Tensor:
        """Sums of squares of whole gradients, from those of this rank's parts.

        Args:
            squares: Shape ``(num_layers,)``.
        """
        return squares  # whole, and averaged over ranks where there are several

    def close(self) -> None:
        """Called when sampling has ended, and all parameters have their ``requires_grad`` back."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @property
    def groups(self) -> list[dist.ProcessGroup | None]:
        """The groups of ranks that must agree; None is all ranks."""
        return [None]

    @property
    def device(self) -> torch.device:
        """Where gradients are reduced."""
        return next(self.model.parameters()).device

    def _refuse_unknown_wrapper(self, module: nn.Module, args: Any) -> None:
        """Stop before the first gradient of a model that was wrapped without the scheduler's knowing."""
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            raise ConfigError(
                "fully_shard must be called before LayerScheduler is made, because FSDP looks at which parameters "
                "require a gradient and replaces them, but the model was sharded after it: with accelerate, too, "
                "make LayerScheduler after prepare()."
            )
        wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if wrapper is None or not torch.is_grad_enabled() or self._copes_alone(wrapper):
            return
        raise ConfigError(
            "LayerScheduler must be given the DistributedDataParallel that the model runs in, but was given the "
            "model inside: gradients of layers that it switches on would not be averaged, or the run would stop. "
            "Wrap the model while every parameter that may train requires a gradient, then make "
            "LayerScheduler(ddp_model, ...). With the Trainer, use "
            "LayerSamplingCallback(...).attach(trainer) in place of callbacks=."
        )

    def _copes_alone(self, wrapper: DistributedDataParallel) -> bool:
        """Whether DDP averages any set of layers by itself: it knows all parameters, and looks for unused ones."""
        if not wrapper.find_unused_parameters or wrapper.static_graph:
            return False
        ddp: Any = wrapper  # its private methods have no types
        return bool(ddp._get_ddp_logging_data()["num_parameter_tensors"] == self._num_trainable)
