"""What must hold under DistributedDataParallel; run by ranks.py on each rank."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from layersample import ConfigError, LayerSamplingCallback, LayerScheduler
from layersample.parallel.ddp import DDPEngine
from layersample.versions import checkpoint_activations
from tests.helpers import make_batch, make_llama
from tests.parallel.ranks import NUM_LAYERS, alone, assert_close, own_rows, train
from tests.parallel.ranks_statistics import compare_statistics


def wrapped(model: nn.Module | None = None, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model or make_llama(NUM_LAYERS, dtype=torch.float64), **options)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train_ddp(ddp: DistributedDataParallel, accumulate: int = 1, **options: Any) -> LayerScheduler:
    optimizer = adamw(ddp)
    scheduler = LayerScheduler(ddp, optimizer, "lisa", **{"period": 2, "seed": 1, "check": True, **options})
    with scheduler:
        train(
            ddp,
            optimizer,
            scheduler,
            range(8),
            accumulate=accumulate,
            part=own_rows(),
            unsynced=lambda last: contextlib.nullcontext() if last else ddp.no_sync(),
        )
    return scheduler


def check_parts_of_layers(folder: Path) -> None:
    options: dict[str, Any] = {"granularity": "module", "draw_budget": "30%"}
    ddp = wrapped()
    train_ddp(ddp, **options)
    assert_close(ddp, alone(**options))


def check_exact_with_accumulation_and_checkpointing(folder: Path) -> None:
    cases: list[tuple[int, dict[str, Any]]] = [(3, {}), (1, {"embeddings": "freeze", "num_active": 1})]
    for accumulate, rules in cases:
        reference = alone(accumulate=accumulate, **rules)
        for reentrant in (None, False, True):
            model = make_llama(NUM_LAYERS, dtype=torch.float64)
            if reentrant is not None:
                checkpoint_activations(model, {"use_reentrant": reentrant})
            ddp = wrapped(model)
            train_ddp(ddp, accumulate, **rules)
            assert_close(ddp, reference)


def check_statistics_are_those_of_one_process(folder: Path) -> None:
    compare_statistics(wrapped())


def check_buckets_hold_active_parameters_only(folder: Path) -> None:
    ddp = wrapped(gradient_as_bucket_view=True)
    optimizer = adamw(ddp)
    scheduler = LayerScheduler(ddp, optimizer, "lisa", num_active=1, period=2, embeddings="freeze")
    for step in range(0, 6, 2):
        for _ in range(2):  # DDP orders its buckets anew in the second step
            active = [p for p in ddp.parameters() if p.requires_grad]
            buckets = ddp.reducer._get_zeros_like_grad_buckets()
            assert sum(bucket.buffer().numel() for bucket in buckets) == sum(p.numel() for p in active)
            assert ddp._get_ddp_logging_data()["num_parameter_tensors"] == len(active)  # type: ignore[no-untyped-call]
            train(ddp, optimizer, scheduler, range(step, step + 1), part=own_rows())
    scheduler.close()
    assert ddp._get_ddp_logging_data()["num_parameter_tensors"] == len(list(ddp.parameters()))  # type: ignore[no-untyped-call]


def check_bucket_views_and_hooks_survive_a_switch(folder: Path) -> None:
    reference = alone()
    ddp = wrapped(gradient_as_bucket_view=True)
    train_ddp(ddp)
    assert_close(ddp, reference)

    sizes: list[int] = []

    def counting(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        sizes.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)

    ddp = wrapped()
    ddp.register_comm_hook(None, counting)
    scheduler = train_ddp(ddp)
    assert_close(ddp, reference)
    numbers = [sum(p.numel() for p in ddp.module.model.layers[0].parameters()) * 2, 16 * (260 * 2 + 1)]
    assert sum(sizes) == 8 * sum(numbers) and scheduler.steps == 8

    ddp = wrapped()
    ddp._register_builtin_comm_hook(  # type: ignore[no-untyped-call]
        dist.BuiltinCommHookType.ALLREDUCE  # type: ignore[attr-defined]
    )
    # Each of the builtin hooks leaves the division by the number of ranks to the hook; so does allreduce.
    train_ddp(ddp)
    assert "ALLREDUCE" in ddp._get_ddp_logging_data()["comm_hook"]  # type: ignore[no-untyped-call]
    assert_close(ddp, reference)


def check_low_rank_and_masters_stay_the_same_on_all_ranks(folder: Path) -> None:
    options: dict[str, Any] = {"projection": "galore", "projection_options": {"rank": 4}}
    ddp = wrapped()
    train_ddp(ddp, **options)
    assert_close(ddp, alone(**options), tolerance=1e-7)

    ddp = wrapped(make_llama(NUM_LAYERS, dtype=torch.bfloat16))
    train_ddp(ddp)  # bf16 weights train on fp32 masters, one on each rank
    for parameter in ddp.parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, parameter)


def check_frozen_weights_are_exact(folder: Path) -> None:
    for form in ("int8", "nf4"):
        reference = alone(frozen_weights=form)
        ddp = wrapped()
        train_ddp(ddp, frozen_weights=form)
        assert_close(ddp, reference)


def check_unused_parameters_are_the_fallback(folder: Path) -> None:
    reference = alone()
    ddp = wrapped(find_unused_parameters=True)

    ddp.register_comm_hook(object(), lambda _, bucket: allreduce_hook(None, bucket))  # type: ignore[arg-type]
    scheduler = train_ddp(ddp)  # the hook has state of its own, so it isn't rebuilt
    assert isinstance(scheduler._engine, DDPEngine) and not scheduler._engine.rebuilds
    assert ddp._get_ddp_logging_data()["num_parameter_tensors"] == len(list(ddp.parameters()))  # type: ignore[no-untyped-call]
    assert_close(ddp, reference)


def check_refusals(folder: Path) -> None:
    def refuse(ddp: DistributedDataParallel, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            LayerScheduler(ddp, adamw(ddp), "lisa")

    refuse(wrapped(static_graph=True), "static_graph=False")
    stateful = wrapped()
    stateful.register_comm_hook(object(), lambda _, bucket: allreduce_hook(None, bucket))  # type: ignore[arg-type]
    refuse(stateful, "find_unused_parameters=True.*keeps state of its own")
    with pytest.MonkeyPatch.context() as patch:
        ddp = wrapped()
        patch.setattr("layersample.parallel.ddp._PRIVATE", ("_gone",))
        refuse(ddp, "lacks what that needs")


def check_a_model_wrapped_unseen_is_refused(folder: Path) -> None:
    ddp = wrapped()
    scheduler = LayerScheduler(ddp.module, adamw(ddp), "lisa")
    with pytest.raises(ConfigError, match="given the DistributedDataParallel"):
        ddp(**make_batch())
    scheduler.close()

    model = make_llama(dtype=torch.float64)
    with LayerScheduler(model, adamw(model), "lisa") as scheduler:
        late = wrapped(model, find_unused_parameters=True)  # it knows the first set of layers alone
        with pytest.raises(ConfigError, match="given the DistributedDataParallel"):
            late(**make_batch())

    ddp = wrapped(find_unused_parameters=True)
    optimizer = adamw(ddp)
    with LayerScheduler(ddp.module, optimizer, "lisa", period=2, seed=1) as scheduler:
        train(ddp, optimizer, scheduler, range(8), part=own_rows())
    assert_close(ddp, alone())


def check_ranks_that_disagree_say_so(folder: Path) -> None:
    model = make_llama()
    with pytest.raises(ConfigError) as caught:
        LayerScheduler(model, adamw(model), "prior", num_active=1, sampler_options={
            "weights": [float(layer == dist.get_rank()) for layer in range(4)]
        })  # fmt: skip
    message = str(caught.value)
    assert "rank 0: period 0: model.layers.0;" in message and "rank 1: period 0: model.layers.1)" in message


def trainer(
    folder: Path,
    callback: LayerSamplingCallback | None = None,
    model: nn.Module | None = None,
    **arguments: Any,
) -> Trainer:
    rows = [{k: v[0].tolist() for k, v in make_batch(i, 1).items()} for i in range(64)]
    return Trainer(
        model=model or make_llama(NUM_LAYERS, dtype=torch.float64),
        args=TrainingArguments(
            output_dir=str(folder),
            **{
                "max_steps": 8,
                "learning_rate": 1e-2,
                "lr_scheduler_type": "constant",
                "logging_strategy": "no",
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                "dataloader_pin_memory": False,
                "per_device_train_batch_size": 4 // (dist.get_world_size() if dist.is_initialized() else 1),
                **arguments,
            },
        ),
        train_dataset=Dataset.from_list(rows),
        callbacks=[callback] if callback else [],
    )


def check_the_trainer(folder: Path) -> None:
    options: dict[str, Any] = {"period": 2, "seed": 1, "check": True}
    # By default the Trainer's DDP looks for unused parameters; with checkpointing it doesn't.
    first = trainer(folder / "a")
    LayerSamplingCallback("lisa", **options).attach(first)
    first.train()
    assert first.model is not None
    if dist.get_rank() == 0:
        torch.save(first.model.state_dict(), folder / "trainer.pt")
    for arguments in (
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"ddp_find_unused_parameters": False},
    ):
        attached = trainer(folder / "b", **arguments)
        LayerSamplingCallback("lisa", **options).attach(attached)
        attached.train()
        assert_close(attached.model, first.model)
    # One that isn't attached doesn't chunk the loss by itself, and the model's own loss is in fp32.
    given = trainer(folder / "c", LayerSamplingCallback("lisa", loss_chunk=128, **options))
    given.train()
    assert_close(given.model, first.model)
    with pytest.raises(ConfigError, match="attach"):
        trainer(folder / "d", LayerSamplingCallback("lisa"), ddp_find_unused_parameters=False).train()


def check_the_trainer_resumes_to_the_bit(folder: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "ddp_find_unused_parameters": False}
    whole = trainer(folder / "whole", **saving)
    LayerSamplingCallback("lisa", period=2, seed=1).attach(whole)
    whole.train()
    part = trainer(folder / "part", **saving)
    LayerSamplingCallback("lisa", period=2, seed=1).attach(part)
    part.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
    assert part.model is not None and whole.model is not None
    for name, parameter in part.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name


def check_accelerate(folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_llama(NUM_LAYERS, dtype=torch.float64)
    model, optimizer = accelerator.prepare(model, adamw(model))
    scheduler = LayerScheduler(model, optimizer, "lisa", period=2, seed=1, check=True)
    model.train()
    for step in range(8):
        for micro in range(2):
            batch = {k: v[own_rows()] for k, v in make_batch(100 * step + micro, 4).items()}
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    assert scheduler.steps == 8
    assert_close(model, alone(accumulate=2))
