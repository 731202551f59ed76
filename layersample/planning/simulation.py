"""One training step on fake tensors: the real model, scheduler and optimizer, and nothing allocated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, masking_utils

from layersample.activations.save_memory import save_memory
from layersample.config import TrainConfig
from layersample.optim.masters import AT_REST, MASTER
from layersample.planning.live_memory import Kind, LiveMemory
from layersample.sampling.sampler import LayerSampler, SamplingContext
from layersample.scheduling.scheduler import LayerScheduler

_MIXED = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}
MOMENTS = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class StepMemory:
    """What one step holds.

    Args:
        moments: Of the forward pass, the backward pass and the optimizer's step: bytes by kind when most was
            held in it.
    """

    moments: dict[str, dict[Kind, int]]

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


@contextmanager
def fake_model(
    shape: PretrainedConfig, precision: str, *, lora_rank: int | None = None
) -> Iterator[nn.Module]:
    """The model of a configuration, with weights that take no memory; they end with the context."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model: nn.Module
    if lora_rank is not None:
        model = _lora_model(shape, dtype, lora_rank)
    with FakeTensorMode():
        if lora_rank is not None:
            _make_fake(model)
        else:
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
        yield model.train()


def simulate_step(
    shape: PretrainedConfig, config: TrainConfig, active: Sequence[int], *, lora_rank: int | None = None
) -> StepMemory:
    """Follow the memory of one step in the middle of a period, when optimizer state is there.

    The step is that of ``layersample train``: fused AdamW, ``batch_size`` examples of ``max_length`` tokens
    without padding, every token with a label.

    Args:
        shape: Configuration of the model.
        config: How it is trained.
        active: Indices of the sampled layers that train.
        lora_rank: Train a LoRA of this rank on all linear layers in their place.
    """
    with fake_model(shape, config.precision, lora_rank=lora_rank) as model, ExitStack() as stack:
        live = LiveMemory(vocabulary=shape.get_text_config().vocab_size)
        live.label([*model.parameters(), *model.buffers()], "weights")
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), fused=True)
        if lora_rank is None:
            scheduler = stack.enter_context(schedule_given(model, optimizer, config, active))
            with live:
                _fill_state(model, optimizer, live)
            scheduler.step()  # from the set that has left its state to the one that trains
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
            )
        )
        with live, _unmasked_attention():
            if lora_rank is not None:
                _fill_state(model, optimizer, live)
            _step(model, optimizer, config, live)
        return StepMemory({name: live.moments[name] for name in MOMENTS})


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, live: LiveMemory) -> None:
    tokens = torch.empty((config.batch_size, config.max_length), dtype=torch.int64)
    autocast = _MIXED.get(config.precision)
    for _ in range(min(config.gradient_accumulation, 2)):  # the second finds the gradients of the first
        with (
            live.moment("forward", "activations"),
            torch.autocast("cpu", autocast, enabled=autocast is not None),
        ):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        with live.moment("backward"):
            loss.backward()
    del loss
    with live.moment("optimizer"):
        if config.clip and not config.step_in_backward:
            trained = [p for p in model.parameters() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()


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


def _fill_state(model: nn.Module, optimizer: torch.optim.Optimizer, live: LiveMemory) -> None:
    """Give the optimizer the state that a first step would leave, without one."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        for key in AT_REST:
            state.pop(key, None)  # in the host's memory, on a real device
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        live.label([tensors.pop(MASTER, None)], "masters")
        live.label(tensors.values(), "optimizer_state")


def schedule_given(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, active: Sequence[int]
) -> LayerScheduler:
    """The real scheduler of a run, whose periods of one step train given layers.

    Args:
        model: The model.
        optimizer: Its optimizer.
        config: How it is trained; the sampler doesn't matter.
        active: Indices of the layers that train. Where state is kept, the first period trains everything, so that
            everything has state.
    """
    given = {
        "sampler": _Given(active, everything_first=config.state == "keep"),
        "sampler_options": None,
        "num_active": 1,
        "period": 1,
        "check": False,
    }
    return LayerScheduler(
        model,
        optimizer,
        **{**config.scheduler_options.arguments(), **given},
    )


class _Given(LayerSampler):
    def __init__(self, active: Sequence[int], *, everything_first: bool) -> None:
        self._active, self._everything_first = active, everything_first

    def sample(self, context: SamplingContext) -> Sequence[int]:
        if self._everything_first and context.round == 0:
            return range(context.num_layers)
        return self._active


def add_lora(model: nn.Module, rank: int, *, on_no_device: bool = False) -> nn.Module:
    """A model with LoRA on all linear layers, as it is planned; without values where asked."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: nn.Module = get_peft_model(model, lora, low_cpu_mem_usage=on_no_device)
    return adapted


def _lora_model(shape: PretrainedConfig, dtype: torch.dtype, rank: int) -> nn.Module:
    """The model with LoRA, on no device: PEFT can't move fake tensors."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    adapted = add_lora(model, rank, on_no_device=True)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:  # PEFT would make 16-bit adapters float32 once they have a device
            parent, _, own = name.rpartition(".")
            setattr(adapted.get_submodule(parent), own, nn.Parameter(parameter.float()))
    return adapted


def _make_fake(model: nn.Module) -> None:
    """Put fake tensors in the place of those on no device; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
                table[name] = made[id(tensor)]  # type: ignore[assignment]
