from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from layersample import ChunkedLoss, ConfigError, LayerSampler, LayerScheduler, SelectiveRecompute
from layersample.cli import app as cli
from layersample.config import TrainConfig
from layersample.optim import masters
from layersample.optim.memory_use import measure_memory
from layersample.planning.active_sets import find_active_sets
from layersample.planning.budget import choose_num_active, parse_budget
from layersample.planning.cards import HEADROOM
from layersample.planning.fake_models import fake_model
from layersample.planning.live_memory import LiveMemory
from layersample.planning.planner import plan
from layersample.planning.shapes import list_shapes, load_shape
from layersample.planning.shards import on_each_gpu, shard, stream
from layersample.planning.simulation import simulate_step
from layersample.versions import checkpoint_activations
from tests.helpers import make_batch, make_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TINY = make_llama().config
LAYER = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32 + 2 * 16  # parameters of one
GROUP = 260 * 16  # of the embedding, and of the head


def config(**options: Any) -> TrainConfig:
    frozen: dict[str, Any] = {"embeddings": "freeze", "head": "freeze", "norm": "freeze"}
    return TrainConfig(**{"batch_size": 2, "max_length": 12, "num_active": 1, **frozen, **options})


def test_weights_gradients_and_state_are_counted_exactly() -> None:
    memory = simulate_step(TINY, config(), (2,))
    parts = memory.moments["optimizer"]
    rotary = 4 * 2 * 4  # inverse frequencies, twice
    assert parts["weights"] == 4 * (4 * LAYER + 2 * GROUP + 16) + rotary
    assert parts["gradients"] == 4 * LAYER
    assert parts["optimizer_state"] == 2 * 4 * LAYER + 9 * 4
    assert parts["masters"] == 0
    half = simulate_step(TINY, config(precision="bf16"), (2,)).moments["optimizer"]
    assert half["gradients"] == 2 * LAYER
    assert half["masters"] == 4 * LAYER and half["optimizer_state"] == 2 * 4 * LAYER + 9 * 4
    plain = simulate_step(TINY, config(precision="bf16", master_weights=False), (2,)).moments["optimizer"]
    assert plain["masters"] == 0 and plain["optimizer_state"] == 2 * 2 * LAYER + 9 * 4


def test_kept_state_is_that_of_every_layer() -> None:
    kept = simulate_step(TINY, config(state="keep"), (2,)).moments["optimizer"]
    assert kept["optimizer_state"] == 4 * (2 * 4 * LAYER + 9 * 4)


@pytest.mark.parametrize("state", ["drop", "offload"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_frozen_layers_leave_behind_is_in_the_host_s_memory(precision: str, state: str) -> None:
    options = config(precision=precision, state=state)
    moments, remainders = (2 * 4 * LAYER + 9 * 4) * (state == "offload"), 2 * LAYER * (precision == "bf16")
    planned = simulate_step(TINY, options, (2,))
    assert planned.host_bytes == 3 * (moments + remainders)
    assert planned.moments["optimizer"]["optimizer_state"] == 2 * 4 * LAYER + 9 * 4  # of the one that trains
    assert simulate_step(TINY, options, (2,), trained=(0,)).host_bytes == moments + remainders
    assert simulate_step(TINY, options, (2,), trained=(2,)).host_bytes == 0


def test_a_run_in_bf16_leaves_behind_what_was_planned() -> None:
    model = make_llama(dtype=torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters())
    frozen: dict[str, Any] = {"embeddings": "freeze", "head": "freeze", "norm": "freeze"}
    with LayerScheduler(model, optimizer, "cyclic", num_active=1, period=1, **frozen) as scheduler:
        for _ in range(5):  # the first layer is back, and the other three have trained
            scheduler.step()
            model(**make_batch(0)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        left = measure_memory(model, optimizer).master_remainders
    assert left == simulate_step(TINY, config(precision="bf16"), (0,)).host_bytes


def test_layers_that_are_never_drawn_are_not_planned_for() -> None:
    upper = config(num_active=2, precision="bf16", sampler="prior", sampler_options={"weights": [0, 0, 1, 1]})
    sets = find_active_sets(TINY, upper)
    assert sets.possible == (2, 3) and sets.worst == ((2, 3),)
    assert sets.notes == ("Layers whose chance is 0 aren't planned for: model.layers.0, model.layers.1.",)
    planned = plan(make_llama().config, upper.model_copy(update={"num_active": 1}), baselines=False)
    assert planned.worst.layers == ("model.layers.2",) and planned.worst.memory.host_bytes == 2 * LAYER
    for name in ("lisa", "cyclic", "bandit"):  # the first gives none; cyclic has turns; bandit learns
        assert find_active_sets(TINY, config(sampler=name)).possible == (0, 1, 2, 3)


def test_a_budget_allows_no_more_layers_than_are_drawn() -> None:
    upper = config(sampler="prior", sampler_options={"weights": [0, 0, 1, 1]})
    assert choose_num_active(TINY, upper, "1GiB") == 2


def test_what_makes_a_step_smaller_makes_the_plan_smaller() -> None:
    lean = config(batch_size=4, max_length=64, loss_chunk=8)

    def peak(active: tuple[int, ...] = (0,), **options: Any) -> int:
        return simulate_step(TINY, lean.model_copy(update=options), active).peak_bytes

    assert peak((3,)) < peak((1,)) < peak((0,))
    assert peak() < peak(loss_chunk=0)
    assert peak() < peak(recompute=False)
    assert peak(gradient_checkpointing=True) < peak()
    assert peak() < peak(embeddings="train", head="train")
    assert peak() < peak(gradient_accumulation=2)  # the second forward finds gradients
    stepping = simulate_step(TINY, lean.model_copy(update={"step_in_backward": True}), (0, 1))
    assert stepping.moments["optimizer"]["gradients"] == 0
    projected = simulate_step(TINY, lean.model_copy(update={"projection": "galore", "rank": 2}), (0,))
    assert projected.parts["optimizer_state"] < simulate_step(TINY, lean, (0,)).parts["optimizer_state"]


def test_layers_that_move_without_state_add_one_parameter_s_gradient() -> None:
    frozen, moving = (
        simulate_step(TINY, config(inactive=rule, step_in_backward=True, clip_by="running"), (0,))
        for rule in ("freeze", "sgd")
    )
    assert moving.moments["optimizer"]["optimizer_state"] == frozen.moments["optimizer"]["optimizer_state"]
    assert moving.moments["optimizer"]["gradients"] == 0
    most = max(weight.numel() for weight in make_llama(4).model.layers[0].parameters()) * 4
    assert moving.moments["backward"]["gradients"] <= frozen.moments["backward"]["gradients"] + most
    # A weight that moves needs its input; what is kept for that is planned as well.
    assert moving.peak_bytes > frozen.peak_bytes


def test_exact_weights_that_move_are_planned_as_a_gpu_moves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: a CPU does it in pieces, which take less memory, and whose simulation would take minutes."""
    options = config(inactive="sgd", step_in_backward=True, clip_by="running", precision="bf16")
    whole = simulate_step(TINY, options, (0,))
    monkeypatch.setattr(masters, "_PIECE", 10)
    assert simulate_step(TINY, options, (0,)).peak_bytes == whole.peak_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_hold_what_real_ones_hold(precision: str, checkpointing: bool) -> None:
    options = config(precision=precision, gradient_checkpointing=checkpointing, clip=1.0)
    planned = simulate_step(TINY, options, (1, 3))
    model = make_llama(dtype=torch.bfloat16 if precision == "bf16" else torch.float32).train()
    if checkpointing:
        checkpoint_activations(model, {"use_reentrant": False})
    live = LiveMemory(vocabulary=260)
    live.label([*model.parameters(), *model.buffers()], "weights")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    frozen: dict[str, Any] = {"embeddings": "freeze", "head": "freeze", "norm": "freeze"}
    batch = make_batch()
    batch["shift_labels"] = batch["labels"]  # a plan counts a label for the last position too
    with (
        LayerScheduler(model, optimizer, Both(), num_active=1, period=9, **frozen),
        ChunkedLoss(model),
        SelectiveRecompute(model),
        live,
    ):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                with live.moment("forward"):
                    loss = model(**batch, use_cache=False).loss
            with live.moment("backward"):
                loss.backward()
            del loss
            with live.moment("optimizer"):
                torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
                optimizer.step()
            optimizer.zero_grad()
    for name, parts in planned.moments.items():
        assert sum(live.moments[name].values()) == pytest.approx(sum(parts.values()), rel=2e-3)


class Both(LayerSampler):
    def sample(self, context: Any) -> tuple[int, ...]:
        return (1, 3)


def test_shapes_have_the_published_numbers_of_parameters() -> None:
    assert {"gpt2", "llama-2-7b", "llama-2-70b", "qwen2.5-7b", "gemma-2-9b"} <= set(list_shapes())
    for name in list_shapes():
        stored = json.loads((files("layersample.planning.shapes") / f"{name}.json").read_text())["parameters"]
        with fake_model(load_shape(name), "bf16") as model:
            assert sum(p.numel() for p in model.parameters()) == stored, name


def test_worst_and_typical_sets() -> None:
    planned = plan(TINY, config(num_active=2), baselines=False)
    assert planned.worst.layers[0] == "model.layers.0"
    sets = find_active_sets(TINY, config(num_active=2))
    assert sets.worst == ((0, 1), (0, 3))
    assert planned.worst.trainable == 2 * LAYER
    assert planned.typical.memory.peak_bytes <= planned.peak_bytes
    sampled = plan(TINY, config(embeddings="sample"), baselines=False)
    assert sampled.worst.layers == ("embeddings",)
    every = plan(TINY, config(sampler="full"), baselines=False)
    assert len(every.worst.layers) == len(every.typical.layers) == 4


def test_samplers_that_must_measure_are_drawn_uniformly_and_it_is_said() -> None:
    sets = find_active_sets(TINY, config(sampler="owlore", num_active=2))
    assert len(sets.typical) == 2 and "drawn uniformly" in sets.notes[0]
    assert find_active_sets(TINY, config()).notes == ()


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ist", {}),
        ("max_wait", {"sampler": "owlore", "periods": 6}),
        ("warmup", {"sampler": "spectrum", "first": 3, "periods": 2}),
        ("mixture", {"samplers": ["lisa", "lora_norm"]}),
    ],
)
def test_so_are_those_around_one(sampler: str, options: dict[str, Any]) -> None:
    sets = find_active_sets(TINY, config(sampler=sampler, sampler_options=options, num_active=2))
    assert sets.typical and "drawn uniformly" in sets.notes[0]
    assert len(sets.worst[0]) == options.get("first", 2), "the period that holds most is planned for"


def test_json_holds_the_peak_and_its_parts() -> None:
    planned = plan(TINY, config())
    content = json.loads(json.dumps(planned.to_json()))
    assert content["peak_bytes"] == sum(content["parts"].values()) == planned.peak_bytes
    peaks = {name: part["peak_bytes"] for name, part in content["baselines"].items()}
    assert list(peaks) == ["full fine-tuning", "LISA as published", "GaLore, rank 128", "LoRA, rank 16"]
    assert peaks["full fine-tuning"] > peaks["LISA as published"]
    assert content["fits"]["16 GB"] and content["headroom_bytes"] == HEADROOM


def test_shards_hold_their_part_and_what_is_gathered() -> None:
    sets = find_active_sets(TINY, config())
    whole = simulate_step(TINY, config(), (0,))
    assert on_each_gpu(whole, sets, 1, (0,), "fsdp2") is whole
    half = shard(whole, sets, 2, (0,))
    before, after = whole.moments["optimizer"], half.moments["optimizer"]
    for kind in ("weights", "gradients", "optimizer_state"):
        assert after[kind] == -(-before[kind] // 2)
    assert half.moments["forward"]["activations"] == whole.moments["forward"]["activations"]
    assert half.moments["forward"]["weights"] > whole.moments["forward"]["weights"] / 2
    planned = plan(TINY, config(shard="fsdp2"), gpus=2, baselines=False)
    assert planned.peak_bytes == half.peak_bytes


def test_under_ddp_each_gpu_holds_all_and_buckets() -> None:
    alone, each = (plan(TINY, config(), gpus=gpus, advice=True).worst.memory for gpus in (1, 2))
    gradients = max(parts["gradients"] for parts in alone.moments.values())
    for name, parts in alone.moments.items():
        assert each.moments[name] == {**parts, "gradients": parts["gradients"] + gradients}
    planned = plan(TINY, config(), gpus=8, advice=True)
    assert planned.advice is not None and "--shard fsdp2" in planned.advice.tried
    assert not any("backward" in flags for flags in planned.advice.tried)
    with pytest.raises(ConfigError, match="step_in_backward must be planned for one GPU.*gpus=2"):
        plan(TINY, config(step_in_backward=True, clip=0), gpus=2)
    with pytest.raises(ValueError, match="frozen_weights needs whole weights on each GPU"):
        config(shard="fsdp2", frozen_weights="nf4")


def test_offloaded_weights_are_on_the_host_but_for_what_is_gathered() -> None:
    given = config(precision="bf16", num_active=2)
    sets, whole = find_active_sets(TINY, given), simulate_step(TINY, given, (0, 1))
    held = stream(whole, sets, (0, 1), given)
    gathered = 2 * (sets.outside + 2 * sets.largest_layer)
    assert held.moments["forward"]["weights"] == pytest.approx(gathered, rel=0.01)  # and buffers
    for name, parts in held.moments.items():
        assert parts["activations"] == whole.moments[name]["activations"]
        assert parts["masters"] == parts["optimizer_state"] == 0
    assert held.moments["optimizer"]["weights"] == held.moments["optimizer"]["temporary"] == 0
    gradient = (2 + 4) * sets.largest_trained((0, 1))
    assert held.moments["backward"]["gradients"] == pytest.approx(gradient, rel=0.01)
    state = whole.moments["optimizer"]["optimizer_state"]
    assert held.host_bytes == 4 * (sets.parameters + sets.trainable((0, 1))) + state
    kept = config(precision="bf16", num_active=2, state="offload")
    frozen = 2 * (2 * 4 * LAYER + 9 * 4)  # the moments of the other two layers
    more = stream(simulate_step(TINY, kept, (0, 1)), sets, (0, 1), kept)
    assert more.host_bytes == held.host_bytes + frozen and more.moments == held.moments
    lean = config(precision="bf16", num_active=2, master_weights=False)
    less = stream(simulate_step(TINY, lean, (0, 1)), sets, (0, 1), lean)
    assert less.host_bytes < held.host_bytes and less.peak_bytes <= held.peak_bytes
    assert less.moments["backward"]["gradients"] < held.moments["backward"]["gradients"]
    planned = plan(TINY, given, offload=True, baselines=False, advice=True)
    assert planned.advice is not None and not any("backward" in flags for flags in planned.advice.tried)
    assert planned.peak_bytes < plan(TINY, given, baselines=False).peak_bytes
    assert planned.to_json()["offload"] and planned.to_json()["host_bytes"] == planned.worst.memory.host_bytes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"frozen_weights": "int8"}, "offload must be planned without frozen weights"),
        (
            {"step_in_backward": True, "clip_by": "running"},
            "offload must be planned without step_in_backward",
        ),
    ],
)
def test_what_offloading_excludes_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(TINY, config(**options), offload=True)


def test_a_budget_chooses_how_many_layers_train() -> None:
    parameters = 4 * LAYER + 2 * GROUP + 16
    assert choose_num_active(TINY, config(), 2.5 * LAYER / parameters) == 2
    assert choose_num_active(TINY, config(), "0.5GB") == 4
    assert plan(TINY, config(budget="0.9"), baselines=False).config.num_active == 4
    two = simulate_step(TINY, config(num_active=2), (0, 1))
    bytes_of_two = two.peak_bytes - two.parts["weights"]
    assert choose_num_active(TINY, config(), f"{bytes_of_two / 1000}kB") == 2
    with pytest.raises(ConfigError, match="must suffice for one layer, which takes .*, but got budget='1kB'"):
        choose_num_active(TINY, config(), "1kB")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2GiB", 2**31),
        ("1.5 MB", 1_500_000),
        ("1TB", 10**12),
        ("2 gib", 2**31),
        ("0.05", 0.05),
        (0.05, 0.05),
        ("1", 1.0),
    ],
)
def test_budgets_are_sizes_or_parts(text: Any, value: float) -> None:
    assert parse_budget(text) == value and type(parse_budget(text)) is type(value)


@pytest.mark.parametrize(
    "text", ["", "two", "0", "0GB", "-1GiB", "1.5", "2 GiBs", "2GiB more", "1.2.3GB", "500%", "nan", "inf"]
)
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="budget must be a size such as '2GiB'"):
        parse_budget(text)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="Unknown model 'llama-2-8b'. Did you mean 'llama-.*gpt2"):
        plan("llama-2-8b")
    with pytest.raises(
        ConfigError, match="max_length must be at most the model's 128 positions, but got 129"
    ):
        plan(TINY, config(max_length=129))
    followed = plan(TINY, TrainConfig(batch_size=1), baselines=False)  # 256 tokens by default
    assert followed.config.max_length == 128 and any("128 tokens at most" in n for n in followed.notes)
    with pytest.raises(ConfigError, match="between 1 and the 4 layers to sample from, but got num_active=5"):
        plan(TINY, config(num_active=5))
    with pytest.raises(ConfigError, match="gpus must be at least 1, but got gpus=0"):
        plan(TINY, config(), gpus=0)
    with pytest.raises(ConfigError, match="Unknown sampler 'liza'"):
        plan(TINY, config(sampler="liza"))
    with pytest.raises(ConfigError, match="Without a network there are: gemma-2-9b, gemma-3-1b"):
        plan("nobody/no-such-model")


def test_a_folder_needs_its_configuration_alone(tmp_path: Path) -> None:
    TINY.save_pretrained(tmp_path)
    assert plan(str(tmp_path), config(), baselines=False).parameters == 4 * LAYER + 2 * GROUP + 16
    assert plan(make_llama(), config(), baselines=False).model == "LlamaForCausalLM"


def test_on_the_command_line(tmp_path: Path) -> None:
    TINY.save_pretrained(tmp_path / "model")
    arguments = ["plan", str(tmp_path / "model"), "--num-active", "1", "--batch", "2", "--length", "16"]
    arguments += [
        "--embeddings",
        "train",
        "--dtype",
        "bf16",
        "--projection",
        "galore",
        "--rank",
        "2",
        "--gpus",
        "2",
    ]
    environment = {"COLUMNS": "80", "NO_COLOR": "1"}
    shown = CliRunner().invoke(
        cli.app, [*arguments, "--picture", str(tmp_path / "plan.png")], env=environment
    )
    assert shown.exit_code == 0, shown.output
    for words in (
        "worst set",
        "typical set",
        "GaLore, rank 128",
        "each of 2 GPUs holds all of the model",
        "1.00 GiB to spare",
        "on this run's terms",
        "as commonly run",
        "What would help most: --",
    ):
        assert words in shown.output
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    printed = CliRunner().invoke(cli.app, [*arguments, "--json", "--no-baselines", "--no-advice"])
    content = json.loads(printed.output)
    assert content["peak_bytes"] > 0 and content["gpus"] == 2 and content["baselines"] == {}
    assert content["config"]["projection"] == "galore"


@pytest.mark.parametrize(
    ("options", "held"),
    [
        ((), None),
        (("--precision", "bf16"), "frozen layers (masters' 16 bits beyond bf16)"),
        (
            ("--precision", "bf16", "--state", "offload"),
            "frozen layers (masters' 16 bits beyond bf16, optimizer state)",
        ),
        (("--offload",), "weights, gradients and optimizer state"),
    ],
)
def test_the_command_says_what_is_in_the_host_s_memory(
    tmp_path: Path, options: tuple[str, ...], held: str | None
) -> None:
    TINY.save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--batch", "1", "--length", "8", "--no-baselines", "--no-advice"]
    shown = CliRunner().invoke(cli.app, [*arguments, *options], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0, shown.output
    assert ("In the host's memory" in shown.output) == (held is not None)
    assert held is None or f" GiB of {held}. A CPU holds them" in shown.output


def test_without_peft_all_but_lora_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    from layersample.planning import comparisons

    whole = comparisons.compared_rows(config())
    monkeypatch.setattr(comparisons, "find_spec", lambda name: None)
    without = comparisons.compared_rows(config())
    assert [name for name in whole if name not in without] == ["LoRA, rank 16"]
