from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback
from trl import SFTConfig, SFTTrainer

from layersample import ConfigError, LayerSamplingCallback, StepInBackward
from tests.helpers import Given, make_batch, make_llama, weights_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def make_trainer(
    output: Path,
    callback: Any,
    *,
    model: Any = None,
    trainer: type[Trainer] = Trainer,
    options: type[TrainingArguments] = TrainingArguments,
    tokenizer: Any = None,
    **arguments: Any,
) -> Trainer:
    rows = [{k: v[0].tolist() for k, v in make_batch(i, 1).items()} for i in range(32)]
    arguments = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": 2,
        **arguments,
    }
    return trainer(
        model=make_llama() if model is None else model,
        args=options(output_dir=str(output), **arguments),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]) if "eval_strategy" in arguments else None,
        processing_class=tokenizer,
        callbacks=[callback] if callback else [],
    )


def logged(trainer: Trainer) -> list[tuple[int, str]]:
    history: Any = trainer.state.log_history  # its type knows of no strings
    return [(r["step"], r.get("active_layers")) for r in history if "loss" in r]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_switches_once_a_period_and_logs_what_is_active(tmp_path: Path, accumulate: int) -> None:
    callback = LayerSamplingCallback(Given((0, 2), (1,)), period=2, check=True)
    trainer = make_trainer(tmp_path, callback, gradient_accumulation_steps=accumulate)
    trainer.train()
    assert logged(trainer) == [(1, "0 2"), (2, "0 2"), (3, "1"), (4, "1"), (5, "0 2"), (6, "0 2")]
    assert trainer.model is not None
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert callback.scheduler is not None and callback.scheduler.round == 2


def test_training_goes_on_after_it_was_interrupted(tmp_path: Path) -> None:
    """In a notebook: the run that was stopped has left its scheduler on the optimizer."""
    callback = LayerSamplingCallback("lisa", period=2, check=True, loss_chunk=4)
    trainer = make_trainer(tmp_path, callback, max_steps=3)
    step, trainer.training_step = trainer.training_step, None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError):
        trainer.train()
    stopped = callback.scheduler
    trainer.training_step = step  # type: ignore[method-assign]
    trainer.train()
    assert callback.scheduler is not stopped and len(logged(trainer)) == 3
    assert trainer.model is not None
    assert all(p.requires_grad for p in trainer.model.parameters())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_all_layers_are_full_fine_tuning_to_the_bit(tmp_path: Path, optim: str, accumulate: int) -> None:
    results = []
    for callback in (None, LayerSamplingCallback("lisa", num_active=4, period=2)):
        trainer = make_trainer(tmp_path, callback, optim=optim, gradient_accumulation_steps=accumulate)
        trainer.train()
        results.append(weights_of(trainer.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
def test_resumes_in_the_middle_of_a_period_to_the_bit(tmp_path: Path, state: Any) -> None:
    def callback() -> LayerSamplingCallback:
        return LayerSamplingCallback("lisa", period=3, seed=3, state=state, check=True)

    arguments: dict[str, Any] = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(tmp_path / "whole", callback(), **arguments)
    whole.train()
    part = make_trainer(tmp_path / "part", callback(), **arguments)
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert logged(part) == logged(whole)
    first, second = weights_of(whole.model), weights_of(part.model)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_reporters_get_the_active_layers_where_it_is_attached(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path, None, report_to="tensorboard")
    callback = LayerSamplingCallback(Given((0, 2), (1,)), period=3).attach(trainer)
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [event.value for event in events.Scalars("train/sampling_round")] == [0, 0, 0, 1, 1, 1]
    assert "train/active_layers/text_summary" in events.Tags()["tensors"]


def test_default_seed_is_the_trainer_s(tmp_path: Path) -> None:
    callback = LayerSamplingCallback("lisa", num_active=1, period=1)
    make_trainer(tmp_path, callback, seed=11).train()
    assert callback.scheduler is not None and callback.scheduler.seed == 11


def test_resuming_another_run_is_refused(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, LayerSamplingCallback("lisa", num_active=1), **saving).train()
    other = make_trainer(tmp_path, LayerSamplingCallback("lisa", num_active=2), **saving)
    with pytest.raises(ConfigError, match="num_active it was begun with: it was 1, but is 2 now"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("restore_callback_states_from_checkpoint", True, "must be False.*takes its own state"),
        ("_n_gpu", 2, "nn.DataParallel.*torchrun"),
        ("fp16", True, "can't look for overflows of fp16 before it steps.*fp16=False"),
        ("max_grad_norm", 1.0, "no gradients to clip.*but got max_grad_norm=1.0"),
    ],
)
def test_arguments_of_the_trainer_that_don_t_go_with_it(
    tmp_path: Path, argument: str, value: Any, message: str, attach: bool
) -> None:
    callback = LayerSamplingCallback("lisa", step_in_backward=StepInBackward())
    trainer = make_trainer(tmp_path, None if attach else callback, max_grad_norm=0.0)
    setattr(trainer.args, argument, value)  # afterwards: here is no GPU
    with pytest.raises(ConfigError, match=message):
        if attach:
            callback.attach(trainer)
        trainer.train()


def test_a_callback_that_the_trainer_has_made_anew_is_refused(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(tmp_path, LayerSamplingCallback(Given((0, 2))), **saving).train()
    again = make_trainer(
        tmp_path,
        LayerSamplingCallback(Given((0, 2))),
        restore_callback_states_from_checkpoint=True,
        **saving,
    )
    with pytest.raises(ConfigError, match="restore_callback_states_from_checkpoint must be False"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_made_without_sampling_goes_on_as_if_it_had_been_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, None, **saving).train()
    callback = LayerSamplingCallback(Given((0,), (1,), (2,)), period=2)
    trainer = make_trainer(tmp_path, callback, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged(trainer)[-2:] == [(5, "2"), (6, "2")]
    assert "made without layer sampling" in caplog.text


def test_state_is_json(tmp_path: Path) -> None:
    callback = LayerSamplingCallback("lisa", layers="model.layers")
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    assert json.loads(json.dumps(callback.state()))["args"]["layers"] == "model.layers"
    assert DefaultFlowCallback in {type(cb) for cb in trainer.callback_handler.callbacks}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # below the lowest active layer
@pytest.mark.parametrize("reentrant", [None, False, True])  # None: no gradient checkpointing
@pytest.mark.parametrize("embeddings", ["freeze", "sample"])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("trl", [False, True])
def test_backward_ends_at_the_lowest_active_layer(
    trl: bool, tie: bool, embeddings: Any, reentrant: bool | None, tiny_model: Path, tmp_path: Path
) -> None:
    model = make_llama(tie=tie)
    asked = [False] * 4  # whether anything wanted the gradient of a layer's input
    for index, layer in enumerate(model.model.layers):

        def look(module: Any, args: Any, index: int = index) -> None:
            asked[index] |= args[0].requires_grad

        layer.register_forward_pre_hook(look)
    arguments: dict[str, Any] = {"max_steps": 2}
    if reentrant is not None:
        kwargs = {"use_reentrant": reentrant}
        arguments |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    else:
        arguments |= {"gradient_checkpointing": False}
    if trl:
        skip = {"skip_prepare_dataset": True}
        arguments |= {"trainer": SFTTrainer, "options": SFTConfig, "dataset_kwargs": skip, "bf16": False}
        arguments["tokenizer"] = AutoTokenizer.from_pretrained(tiny_model)
    lowest = 2 if embeddings == "freeze" else 3  # a sampled embedding is unit 0
    callback = LayerSamplingCallback(Given((lowest,)), num_active=1, period=2, embeddings=embeddings)
    trainer = make_trainer(tmp_path, callback, model=model, **arguments)
    before = weights_of(model)
    trainer.train()
    changed = {name for name, weight in weights_of(model).items() if not torch.equal(weight, before[name])}
    assert any(".2." in name for name in changed) and not any(".1." in name for name in changed)
    assert asked == [False, False, False, True], "backward went below layer 2, or didn't reach it"


def test_an_error_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """A plain Trainer on the same model afterwards trains all of it, by the model's own loss."""

    class Stop(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("enough")

    model = make_llama()
    trainer = make_trainer(tmp_path, None, model=model)
    LayerSamplingCallback("cyclic", num_active=1, period=2).attach(trainer)
    trainer.add_callback(Stop())
    with pytest.raises(RuntimeError, match="enough"):
        trainer.train()
    assert all(p.requires_grad for p in model.parameters())
    assert model.train()(**make_batch(0)).logits is not None
