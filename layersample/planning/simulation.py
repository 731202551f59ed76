"""One training step on fake tensors: the real model, scheduler and optimizer, and nothing allocated."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PretrainedConfig, masking_utils

from layersample.activations.save_memory import save_memory
from layersample.config import TrainConfig
from layersample.errors import ConfigError, first_line
from layersample.optim.masters import AT_REST, MASTER
from layersample.planning.fake_models import fake_model
from layersample.planning.live_memory import Kind, LiveMemory
from layersample.planning.model_kinds import Batch, ModelKind, find_kind
from layersample.registry import create_sampler
from layersample.sampling.full_rank import FullRank
from layersample.sampling.sampler import LayerSampler, SamplingContext
from layersample.scheduling.scheduler import LayerScheduler

_MIXED = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}
MOMENTS = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class StepMemory:
    """What one step holds.

    Args:
        moments: For the forward pass, the backward pass and the optimizer's step: bytes by kind when most was
            held in it.
        host_bytes: Bytes in the host's memory, which is the same one where a CPU trains: exact values of frozen
            weights, what makes masters of bf16 weights exact while these are frozen, offloaded state; or what is
            streamed from there.
        host_state: Of them, bytes of offloaded state.
    """

    moments: dict[str, dict[Kind, int]]
    host_bytes: int = 0
    host_state: int = 0

    @property
    def peak_moment(self) -> str:
        """The moment in which most is held."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[Kind, int]:
        """Bytes by kind at the peak."""
        return self.moments[self.peak_moment]

    @property
    def peak_bytes(self) -> int:
        """Most bytes held at once."""
        return sum(self.parts.values())


def simulate_step(
    shape: PretrainedConfig,
    config: TrainConfig,
    active: Sequence[int],
    *,
    lora_rank: int | None = None,
    kind: ModelKind | None = None,
    trained: Sequence[int] | None = None,
) -> StepMemory:
    """Follow the memory of one step in the middle of a period, when optimizer state is there.

    The step is that of ``layersample train``: fused AdamW, ``batch_size`` examples of ``max_length`` tokens
    without padding, every token with a label.

    Args:
        shape: Configuration of the model.
        config: How it is trained.
        active: Indices of the sampled layers that train.
        lora_rank: Train a LoRA of this rank on all linear layers in their place.
        kind: How the model is built and fed; found from its configuration by default.
        trained: Indices of the layers that have trained by then, beside those that do now: some of their state may be
            there still. All by default.

    Raises:
        ConfigError: If the model is of a kind that isn't planned, or a step of it needs more than fake tensors have.
    """
    kind = kind or find_kind(shape)
    with fake_model(shape, config.precision, lora_rank=lora_rank, kind=kind) as model, ExitStack() as stack:
        live = LiveMemory(vocabulary=getattr(shape.get_text_config(), "vocab_size", None))
        live.label([*model.parameters(), *model.buffers()], "weights")
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), fused=True)
        host_bytes = host_state = 0
        if lora_rank is None:
            before: Sequence[int] | Literal["all"] = "all" if trained is None else sorted({*active, *trained})
            first = before if _leaves_something(config) else None
            scheduler = stack.enter_context(schedule_given(model, optimizer, config, active, first=first))
            with live:
                _fill_state(model, optimizer, live, without=scheduler.moving_parameters)
            scheduler.step()  # from the set that has left its state to the one that trains
            host_bytes = _put_away(optimizer)
            if config.state == "offload":
                host_state = _offload(optimizer, live)
            if scheduler.sampler.needs_projection:  # that state has begun anew
                with live:
                    _fill_state(model, optimizer, live, without=scheduler.moving_parameters)
            host_bytes += _hold_frozen(model, live, scheduler, masters=config.master_weights)
        for parameter in model.parameters():
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda p: live.label([p.grad], "gradients")
                )
                # In front: a step in backward leaves no gradient behind.
                parameter._post_accumulate_grad_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
        stack.enter_context(
            save_memory(
                model,
                loss_chunk=config.chunk_positions,
                recompute=config.recompute,
                gradient_checkpointing=config.gradient_checkpointing,
                strict=config.loss_chunk != "auto",
            )
        )
        with live, _unmasked_attention():
            if lora_rank is not None:
                _fill_state(model, optimizer, live)
            _step(model, optimizer, config, kind.make_batch(shape, config), live)
        moments = {name: live.moments[name] for name in MOMENTS}
        return StepMemory(moments, host_bytes + host_state, host_state)


def _leaves_something(config: TrainConfig) -> bool:
    """Whether a layer that is frozen leaves anything in the optimizer's state; of rounded weights see below."""
    masters = config.has_masters and config.frozen_weights is None
    return masters or config.state != "drop"


def _put_away(optimizer: torch.optim.Optimizer) -> int:
    """Count not at all what makes masters of frozen parameters exact: it is in the host's memory; its bytes there."""
    return sum(state.pop(key).nbytes for state in optimizer.state.values() for key in AT_REST if key in state)


def _offload(optimizer: torch.optim.Optimizer, live: LiveMemory) -> int:
    """Count the state of frozen parameters not at all, which is in the host's memory; its bytes there."""
    frozen = [state for parameter, state in optimizer.state.items() if not parameter.requires_grad]
    return sum(
        live.leave_out(value for value in state.values() if isinstance(value, Tensor)) for state in frozen
    )


def _hold_frozen(model: nn.Module, live: LiveMemory, scheduler: LayerScheduler, *, masters: bool) -> int:
    """Count rounded weights as what they are, and their exact values not at all: they are in the host's memory.

    Returns:
        Bytes of exact values there, with what masters hold beyond bf16, once all layers have trained.
    """
    if scheduler.frozen is None:
        return 0
    live.leave_out(scheduler.frozen.exact_tensors)
    live.label([*model.parameters(), *scheduler.frozen.tensors], "weights")
    exact = sum(model.get_parameter(name).nbytes for name in scheduler.frozen.names)
    return exact + (scheduler.frozen.remainder_bytes if masters else 0)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, batch: Batch, live: LiveMemory
) -> None:
    autocast = _MIXED.get(config.precision)
    for _ in range(min(config.gradient_accumulation, 2)):  # the second finds the gradients of the first
        with (
            live.moment("forward", "activations"),
            torch.autocast("cpu", autocast, enabled=autocast is not None),
        ):
            loss = _forward(model, batch)
        with live.moment("backward"):
            loss.backward()
    del loss
    with live.moment("optimizer"):
        if config.clip and not config.step_in_backward:
            trained = [p for p in model.parameters() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()


def _forward(model: nn.Module, batch: Batch) -> Any:
    """The loss of a batch.

    Raises:
        ConfigError: If the model's own code fails on tensors without values.
    """
    peft: Any = model
    inner: Any = peft.get_base_model() if hasattr(model, "get_base_model") else model
    # A cache of keys and values is of no use in training, but a model makes one unless it is told.
    cache = {"use_cache": False} if "use_cache" in inspect.signature(inner.forward).parameters else {}
    try:
        loss = model(**batch, **cache).loss
    except Exception as error:  # code of other people, which may need anything: a value, a GPU, an image
        raise ConfigError(
            f"A step of {type(inner).__name__} can't be planned: on tensors without values its forward pass ends with "
            f"{first_line(error)}"
        ) from error
    if loss is None:
        raise ConfigError(
            f"A step of {type(inner).__name__} can't be planned: it computes no loss from labels."
        )
    return loss


@contextmanager
def _unmasked_attention() -> Iterator[None]:
    """Have transformers leave out the mask of a batch without padding, as it does where it can read the batch.

    On fake tensors it takes itself to be traced, and makes a mask for any batch: memory that a run doesn't use.
    """
    before = masking_utils.is_tracing  # type: ignore[attr-defined]
    masking_utils.is_tracing = lambda tensor=None: False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        masking_utils.is_tracing = before  # type: ignore[attr-defined]


def _fill_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    live: LiveMemory,
    *,
    without: Collection[str] = (),
) -> None:
    """Give the optimizer the state that a first step would leave, without one.

    Args:
        model: The model.
        optimizer: Its optimizer.
        live: What follows memory.
        without: Names of parameters that move without state.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in without:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        live.label([tensors.pop(MASTER, None)], "masters")
        live.label(tensors.values(), "optimizer_state")


def schedule_given(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    active: Sequence[int],
    *,
    first: Sequence[int] | Literal["all"] | None = None,
) -> LayerScheduler:
    """The real scheduler of a run, whose periods of one step train given layers.

    Args:
        model: The model.
        optimizer: Its optimizer.
        config: How it is trained; of its sampler, whether it trains everything.
        active: Indices of the layers that train.
        first: Indices of those that train in the first period; by default the same, or all where state is kept, so
            that everything has state.
    """
    if first is None:
        first = "all" if config.state == "keep" else active
    sampler = _Given(active, first)
    own = create_sampler(config.sampler, config.sampler_options)
    sampler.trains_everything, sampler.needs_projection = own.trains_everything, own.needs_projection

    def full_rank(context: SamplingContext) -> FullRank | None:
        with unset_fake_temporarily():  # a draw needs values
            return own.full_rank(context)

    sampler.full_rank = full_rank  # type: ignore[method-assign]
    given = {
        "sampler": sampler,
        "sampler_options": None,
        "num_active": config.num_active if own.needs_projection else 1,
        "draw_budget": None,
        "period": 1,
        "check": False,
    }
    return LayerScheduler(
        model,
        optimizer,
        **{**config.scheduler_options.arguments(), **given},
    )


class _Given(LayerSampler):
    def __init__(self, active: Sequence[int], first: Sequence[int] | Literal["all"]) -> None:
        self._active, self._first = active, first

    def sample(self, context: SamplingContext) -> Sequence[int]:
        if context.round > 0:
            return self._active
        return range(context.num_layers) if self._first == "all" else self._first
