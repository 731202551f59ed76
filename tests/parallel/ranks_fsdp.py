"""What must hold under FSDP2 (fully_shard); run by ranks.py on each rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig  # type: ignore[attr-defined]
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM

from layersample import (
    ChunkedLoss,
    ConfigError,
    LayerSamplingCallback,
    LayerScheduler,
    create_projection,
    create_sampler,
    measure_memory,
)
from layersample.checkpoints.sharded import load_distributed, optimizer_of, save_distributed
from layersample.integrations.trainer_checkpoints import check_can_save
from layersample.projection.low_rank import BASIS
from layersample.unwrapping import local_part
from layersample.versions import checkpoint_activations
from tests.helpers import make_batch, make_llama
from tests.parallel.ranks import NUM_LAYERS, alone, assert_close, own_rows, train
from tests.parallel.ranks_ddp import trainer
from tests.parallel.ranks_statistics import Keeps, compare_statistics


def sharded(model: LlamaForCausalLM | None = None, **options: Any) -> LlamaForCausalLM:
    model = model or make_llama(NUM_LAYERS, dtype=torch.float64)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def shard_of(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter, which must be sharded."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of all ranks, gathered on each."""
    return {
        n: p.full_tensor().detach() if isinstance(p, DTensor) else p.detach()
        for n, p in model.named_parameters()
    }


def run(
    model: nn.Module,
    steps: range = range(8),
    *,
    accumulate: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> LayerScheduler:
    optimizer = optimizer or adamw(model)
    scheduler = LayerScheduler(model, optimizer, "lisa", **{"period": 2, "seed": 1, "check": True, **options})

    class Unsynced:
        def __init__(self, last: bool) -> None:
            self.last = last

        def __enter__(self) -> None:
            assert isinstance(model, FSDPModule)
            model.set_requires_gradient_sync(self.last)

        def __exit__(self, *_: object) -> None: ...

    train(model, optimizer, scheduler, steps, accumulate=accumulate, part=own_rows(), unsynced=Unsynced)
    return scheduler


def check_statistics_are_those_of_one_process(folder: Path) -> None:
    compare_statistics(sharded())
    wrapped = FullyShardedDataParallel(
        make_llama(NUM_LAYERS), use_orig_params=True, device_id=torch.device("cpu")
    )
    with pytest.raises(ConfigError, match="learns from gradients needs FSDP2"):
        LayerScheduler(wrapped, adamw(wrapped), Keeps())
    model = sharded()
    with pytest.raises(ConfigError, match="what a projection leaves out needs whole gradients"):
        LayerScheduler(model, adamw(model), "gum", num_active=1, projection="galore")


def check_changes_of_shards_are_not_known_in_a_period_that_is_resumed(folder: Path) -> None:
    options: dict[str, Any] = {"num_active": 2, "period": 2}
    model = sharded()
    optimizer = adamw(model)
    scheduler = LayerScheduler(model, optimizer, Keeps(), **options)
    train(model, optimizer, scheduler, range(3), part=own_rows())
    state = scheduler.state_dict()
    assert None not in scheduler.statistics.weight_change[:2]
    assert all(isinstance(key, int) for key in optimizer.state_dict()["state"]), "weights of shards are in it"
    scheduler.close()
    scheduler = LayerScheduler(model, optimizer, Keeps(), **options, state_dict=state)
    train(model, optimizer, scheduler, range(3, 4), part=own_rows())
    changes = scheduler.statistics.weight_change
    assert None not in changes[:2] and changes[2:4] == (None, None)


def check_exact(folder: Path) -> None:
    for options in (
        {"accumulate": 3},
        {"embeddings": "freeze", "num_active": 1, "state": "offload"},
        {"embeddings": "sample", "state": "keep"},
    ):
        model = sharded()
        run(model, **options).close()
        assert_close(model, alone(**options))
    reference = alone()
    model = make_llama(NUM_LAYERS, dtype=torch.float64)
    checkpoint_activations(model, {"use_reentrant": False})
    for each in (
        sharded(model),
        sharded(mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))),
        sharded(reshard_after_forward=False),
    ):
        run(each).close()
        assert_close(each, reference)


def check_units_smaller_than_what_is_sharded_as_one(folder: Path) -> None:
    for options in (
        {"granularity": "module", "num_active": 5},
        {"granularity": "tensor", "draw_budget": "12%", "embeddings": "sample"},
    ):
        model = sharded()
        run(model, **options).close()
        assert_close(model, alone(**options))
    wrapped = FullyShardedDataParallel(
        make_llama(NUM_LAYERS), use_orig_params=True, device_id=torch.device("cpu")
    )
    with pytest.raises(ConfigError, match="draw_budget needs FSDP2"):
        LayerScheduler(wrapped, adamw(wrapped), draw_budget="50%")


def check_the_chunked_loss(folder: Path) -> None:
    """With the head in the root's unit, and in one of its own, whose weight is a shard again when it is used."""
    whole = make_llama(NUM_LAYERS, dtype=torch.float64)
    ChunkedLoss(whole, chunk_size=5)
    reference = alone(model=whole)
    for unit in (False, True):
        model = make_llama(NUM_LAYERS, dtype=torch.float64)
        if unit:
            fully_shard(model.lm_head)
        sharded(model)
        with ChunkedLoss(model, chunk_size=5):
            run(model).close()
        assert_close(model, reference)


def masked(model: nn.Module, active: Sequence[Sequence[int]], period: int) -> None:
    """The naive way: compute all gradients, and forget those of layers that aren't active."""
    optimizer = adamw(model)
    model.train()
    for step in range(8):
        layers = active[step // period]
        model(
            **{k: v[own_rows()] for k, v in make_batch(100 * step, 4).items()}, use_cache=False
        ).loss.backward()
        for name, parameter in model.named_parameters():
            if ".layers." in name and int(name.split(".")[2]) not in layers:
                parameter.grad = None
                optimizer.state.pop(parameter, None)
        optimizer.step()
        optimizer.zero_grad()


def check_mixed_precision_is_the_naive_run_to_the_bit(folder: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(make_llama(), mp_policy=policy)
    optimizer = adamw(model)
    scheduler = LayerScheduler(model, optimizer, "lisa", period=2, seed=1, check=True)
    active = []
    for step in range(0, 8, 2):
        active.append(scheduler.active)
        train(model, optimizer, scheduler, range(step, step + 2), part=own_rows())
    assert len(set(active)) > 2
    naive = sharded(make_llama(), mp_policy=policy)
    masked(naive, active, 2)
    for name, parameter in model.named_parameters():
        assert torch.equal(shard_of(parameter), shard_of(naive.get_parameter(name))), name


def check_frozen_layers_skip_reduce_scatter(folder: Path) -> None:
    model = sharded()
    optimizer = adamw(model)
    scatters = []
    for embeddings in ("train", "freeze"):
        with LayerScheduler(model, optimizer, "lisa", num_active=1, embeddings=embeddings):
            with CommDebugMode() as counted:  # type: ignore[no-untyped-call]
                train(model, optimizer, None, range(1), part=own_rows())
            scatters.append(
                sum(n for op, n in counted.get_comm_counts().items() if "reduce_scatter" in str(op))
            )
    assert scatters == [2, 2]  # one layer, and what is outside of the layers
    with CommDebugMode() as counted:  # type: ignore[no-untyped-call]
        train(model, optimizer, None, range(1), part=own_rows())
    assert (
        sum(n for op, n in counted.get_comm_counts().items() if "reduce_scatter" in str(op)) == NUM_LAYERS + 1
    )


def check_state_and_memory_are_of_the_shards(folder: Path) -> None:
    whole = make_llama(NUM_LAYERS, dtype=torch.float64)
    held = {}
    for name, model in (("whole", whole), ("sharded", sharded())):
        optimizer = adamw(model)
        with LayerScheduler(model, optimizer, "lisa", num_active=1, period=4, seed=1) as scheduler:
            train(model, optimizer, None, range(1))
            frozen = [p for p in model.parameters() if not p.requires_grad]
            assert frozen and not any(p in optimizer.state or p.grad is not None for p in frozen)
            held[name] = measure_memory(model, optimizer)
            assert scheduler.round == 0
        if name == "sharded":
            moments = [s["exp_avg"] for s in optimizer.state.values()]
            assert all(isinstance(moment, DTensor) for moment in moments)
    assert 0.45 < held["sharded"].weights / held["whole"].weights < 0.6
    assert 0.45 < held["sharded"].optimizer_state / held["whole"].optimizer_state < 0.6


def check_offloaded_state_goes_and_comes_back(folder: Path) -> None:
    """DTensors move like tensors; the meta device stands in for a second one."""
    model = sharded()
    optimizer = adamw(model)
    train(model, optimizer, None, range(1), part=own_rows())
    moment = next(iter(optimizer.state.values()))["exp_avg"]
    away = moment.to("meta")
    assert away.device.type == "meta" and isinstance(away, DTensor) and away.placements == moment.placements
    assert moment.cpu().device == next(model.parameters()).device


def check_samplers_measure_before_sharding(folder: Path) -> None:
    batches = [make_batch(i) for i in range(2)]
    with pytest.raises(ConfigError, match="must measure the model once"):
        model = sharded(make_llama())
        LayerScheduler(model, adamw(model), "owlore", batches=batches)
    model = make_llama()
    sampler = create_sampler("owlore", {"threshold": 2.0})
    LayerScheduler(model, adamw(model), sampler, batches=batches).close()
    model = sharded(model)
    optimizer = adamw(model)
    scores = dict(sampler.state_dict()["scores"])
    with LayerScheduler(model, optimizer, sampler, period=1) as scheduler:
        train(model, optimizer, scheduler, range(3), part=own_rows())
    assert scores and sampler.state_dict()["scores"] == scores


def check_made_before_sharding_is_refused(folder: Path) -> None:
    model = make_llama()
    scheduler = LayerScheduler(model, adamw(model), "lisa")
    sharded(model)
    with pytest.raises(ConfigError, match="fully_shard"):
        model(**make_batch())
    scheduler._engine.close()


def fsdp1(model: nn.Module, use_orig_params: bool = True, **options: Any) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(
        model,
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
        **options,
    )


def check_fsdp1_is_exact_with_its_original_parameters(folder: Path) -> None:
    cases: list[dict[str, Any]] = [{}, {"embeddings": "freeze", "num_active": 1, "state": "offload"}]
    for options in cases:
        model = fsdp1(make_llama(NUM_LAYERS, dtype=torch.float64))
        optimizer = adamw(model)
        scheduler = LayerScheduler(
            model, optimizer, "lisa", **{"period": 2, "seed": 1, "check": True, **options}
        )
        train(model, optimizer, scheduler, range(8), part=own_rows())
        scheduler.close()
        with FullyShardedDataParallel.summon_full_params(model):
            reference = dict(alone(**options).named_parameters())
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter, reference[name], rtol=0, atol=1e-9)


def check_fsdp1_with_flat_parameters_is_refused(folder: Path) -> None:
    model = fsdp1(make_llama(), use_orig_params=False)
    with pytest.raises(ConfigError, match="use_orig_params=True"):
        LayerScheduler(model, adamw(model), "lisa")


def check_fsdp1_checkpoints(folder: Path) -> None:
    whole = fsdp1(make_llama(NUM_LAYERS, dtype=torch.float64))
    optimizer = adamw(whole)
    scheduler = LayerScheduler(whole, optimizer, "lisa", period=2, seed=1)
    train(whole, optimizer, scheduler, range(3), part=own_rows())
    save_distributed(folder / "fsdp1", whole, optimizer, scheduler.state_dict())
    train(whole, optimizer, scheduler, range(3, 6), part=own_rows())
    part = fsdp1(make_llama(NUM_LAYERS, dtype=torch.float64))
    loaded = adamw(part)
    state = load_distributed(folder / "fsdp1", part, loaded)
    resumed = LayerScheduler(part, loaded, "lisa", period=2, seed=1, state_dict=state)
    train(part, loaded, resumed, range(3, 6), part=own_rows())
    for name, parameter in part.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def check_checkpoints_continue_to_the_bit(folder: Path) -> None:
    # Right after a switch, and in mid-period.
    for state, at in (("drop", 4), ("drop", 5), ("keep", 5), ("offload", 5)):
        place = folder / f"{state}-{at}"
        whole = sharded()
        optimizer = adamw(whole)
        scheduler = run(whole, range(at), optimizer=optimizer, state=state)
        save_distributed(place, whole, optimizer, scheduler.state_dict())
        train(whole, optimizer, scheduler, range(at, 8), part=own_rows())

        part = sharded()
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.zero_()
        loaded = adamw(part)
        resumed = run(
            part,
            range(at, 8),
            optimizer=loaded,
            state=state,
            state_dict=load_distributed(place, part, loaded),
        )
        assert resumed.state_dict() == scheduler.state_dict()
        for name, parameter in part.named_parameters():
            assert torch.equal(shard_of(parameter), shard_of(whole.get_parameter(name))), name
        resumed.close()
        scheduler.close()
        assert all(p.requires_grad for p in part.parameters())
        if dist.get_rank() == 0:
            assert not list(folder.glob(".*.new"))
        weights = whole_weights(whole)
        if dist.get_rank() == 0:
            torch.save(weights, folder / f"{state}-after.pt")


class Accelerator:
    """As much of accelerate's as its functions for checkpoints of FSDP2 use; on the CPU it would take DDP."""

    distributed_type = None
    process_index = property(lambda self: dist.get_rank())
    num_processes = property(lambda self: dist.get_world_size())
    is_main_process = property(lambda self: dist.get_rank() == 0)
    is_fsdp2 = True

    def wait_for_everyone(self) -> None:
        dist.barrier()


def check_accelerate_s_optimizer_checkpoints(folder: Path) -> None:
    """What the Trainer does under FSDP2, which LayerSamplingCallback.attach reaches into."""
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils.fsdp_utils import load_fsdp_optimizer, save_fsdp_optimizer

    PartialState(cpu=True)  # its functions log through it
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
        whole = sharded()
        optimizer = adamw(whole)
        scheduler = run(whole, range(3), optimizer=optimizer, num_active=1)
        save_fsdp_optimizer(plugin, Accelerator(), optimizer, whole, str(folder / kind))
        scheduler.close()
        part = sharded()
        loaded = adamw(part)
        with optimizer_of(str(folder / kind), part):
            load_fsdp_optimizer(plugin, Accelerator(), loaded, part, str(folder / kind))
        assert all(p.requires_grad for p in part.parameters())
        held: dict[str, Any] = {name: loaded.state.get(p) for name, p in part.named_parameters()}
        for name, parameter in whole.named_parameters():
            assert bool(held[name]) == (parameter in optimizer.state), name
            for key, value in optimizer.state.get(parameter, {}).items():
                assert torch.equal(local_part(value), local_part(held[name][key])), (name, key)


def check_the_trainer(folder: Path) -> None:
    """With a model that transformers shards as it loads it, which the Trainer takes as it is."""
    if dist.get_rank() == 0:
        make_llama(NUM_LAYERS, dtype=torch.float64).save_pretrained(folder / "whole")
    dist.barrier()
    model = LlamaForCausalLM.from_pretrained(
        folder / "whole", distributed_config=DistributedConfig(fsdp_size=2), dtype=torch.float64
    )
    run = trainer(folder / "trainer", model=model, gradient_accumulation_steps=2)
    LayerSamplingCallback("lisa", period=2, seed=1, check=True).attach(run)
    run.train()
    assert run.model is model and any(isinstance(p, DTensor) for p in model.parameters())
    weights = whole_weights(model)
    if dist.get_rank() == 0:
        torch.save(weights, folder / "trainer.pt")


def check_the_trainer_s_checkpoints_of_a_projection_are_refused(folder: Path) -> None:
    def args(**more: Any) -> TrainingArguments:
        return trainer(folder / "refused", **more).args

    saves = args(save_strategy="steps")
    with pytest.raises(ConfigError, match="of a sharded model can't hold .* save_distributed in a loop"):
        check_can_save(saves, sharded(), projects=True)
    check_can_save(saves, sharded(), projects=False)
    check_can_save(saves, make_llama(), projects=True)
    for fine in ({"save_strategy": "no"}, {"save_strategy": "steps", "save_only_model": True}):
        check_can_save(args(**fine), sharded(), projects=True)


def check_projection_on_shards(folder: Path) -> None:
    """GaLore on shards is GaLore on whole gradients; its low-rank state is spread over the ranks."""
    for name, options in (
        ("galore", {"rank": 4, "basis": "svd", "update_gap": 3}),
        ("galore", {"rank": 4, "side": "reverse_std", "rotate_moments": True}),
        ("fira", {"rank": 4}),
        ("apollo", {"rank": 4}),
    ):
        more: dict[str, Any] = {"projection": name, "projection_options": options, "state": "keep"}
        model = sharded()
        scheduler = run(model, **more)
        state = next(s for s in scheduler.optimizer.state.values() if BASIS in s)
        assert local_part(state["exp_avg"]).numel() * 2 == state["exp_avg"].numel()
        scheduler.close()
        assert_close(model, alone(**more), 1e-7)


def projected(state: str, rotate: bool = False) -> dict[str, Any]:
    galore = {"rank": 4, "update_gap": 3, "rotate_moments": rotate}
    return {"projection": create_projection("galore", galore), "state": state}


PROJECTED = (
    ("drop", False, 3),
    ("drop", False, 4),
    ("keep", False, 4),
    ("keep", True, 3),
    ("offload", False, 4),
)  # state, rotate_moments, steps done when it is saved


def check_checkpoints_hold_the_projection(folder: Path) -> None:
    # In mid-period, and right after a switch, when the layers that train have no state and no basis yet; under keep
    # and offload those that are frozen have state of low rank, and no basis any more.
    for state, rotate, at in PROJECTED:
        more = projected(state, rotate)
        place = folder / f"projected-{state}-{rotate}-{at}"
        whole = sharded()
        optimizer = adamw(whole)
        scheduler = run(whole, range(at), optimizer=optimizer, **more)
        save_distributed(place, whole, optimizer, scheduler.state_dict())
        train(whole, optimizer, scheduler, range(at, 7), part=own_rows())
        second = sharded()
        optimizer = adamw(second)
        with pytest.raises(ConfigError, match="the rank was 4, but is none now"):
            load_distributed(place, second, optimizer)
        loaded = load_distributed(place, second, optimizer, more["projection"])
        assert all(p.requires_grad for p in second.parameters())
        run(second, range(at, 7), optimizer=optimizer, state_dict=loaded, **more)
        for name, parameter in second.named_parameters():
            assert torch.equal(shard_of(parameter), shard_of(whole.get_parameter(name))), (place, name)
        weights = whole_weights(whole)
        if dist.get_rank() == 0:
            torch.save(weights, f"{place}-after.pt")


def check_masters_of_shards_are_refused(folder: Path) -> None:
    model = sharded(make_llama(NUM_LAYERS, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match="shard the model in float32 with"):
        LayerScheduler(model, adamw(model), "lisa")
    LayerScheduler(model, adamw(model), "lisa", master_weights=False).close()


def check_frozen_weights_of_shards_are_refused(folder: Path) -> None:
    model = sharded()
    with pytest.raises(ConfigError, match="needs whole weights on each rank, but the model is sharded"):
        LayerScheduler(model, adamw(model), "lisa", frozen_weights="nf4")


def check_offloaded_weights_are_streamed_exactly(folder: Path) -> None:
    """What to do where frozen weights must stay exact: they are in the host's memory, a unit at a time on the device."""
    options: dict[str, Any] = {"embeddings": "freeze", "head": "freeze", "norm": "freeze"}
    model = sharded(offload_policy=CPUOffloadPolicy(pin_memory=torch.cuda.is_available()))
    scheduler = run(model, **options)
    assert_close(model, alone(**options))
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert scheduler.coverage > 0.5
