from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

from layersample import ConfigError, LayerSamplingCallback, LayerScheduler, StepInBackward
from tests.helpers import OLD_TRAINER, Given, make_batch, make_llama

NAME = "layersample.scheduling.gradient_watch"


class Cut(nn.Module):
    """Layers of which some get no gradient in some calls, as ``skips`` says by the number of the call."""

    def __init__(self, skips: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 1)
        self.calls, self._skips = 0, skips

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            if not self._skips(index, self.calls):
                x = x + block(x)
        self.calls += 1
        loss: torch.Tensor = self.head(x).square().mean()
        return loss


def train(model: nn.Module, steps: int, accumulation: int = 1, **options: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"layers": "blocks", "num_active": 2, "period": 2, **options}
    with LayerScheduler(model, optimizer, Given((0, 1), (1, 2)), **options) as scheduler:
        for _ in range(steps):
            for _ in range(accumulation):
                model(torch.ones(2, 4)).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_layer_without_gradient_is_named_once(
    caplog: pytest.LogCaptureFixture, backward: bool, accumulation: int
) -> None:
    options = {"step_in_backward": StepInBackward(accumulation=accumulation)} if backward else {}
    train(Cut(lambda index, call: index == 1), 16, accumulation, **options)
    assert [record.args for record in caplog.records if record.name == NAME] == [("blocks.1", 4)]
    assert all(record.levelno == logging.WARNING for record in caplog.records if record.name == NAME)


def test_a_layer_that_is_left_out_now_and_then_is_not(caplog: pytest.LogCaptureFixture) -> None:
    train(Cut(lambda index, call: (call + index) % 3 == 0), 24, period=1)
    train(Cut(lambda index, call: call % 7 < 3), 24)  # as three in a row
    assert NAME not in {record.name for record in caplog.records}


def test_nothing_is_said_where_nothing_else_got_a_gradient_either(caplog: pytest.LogCaptureFixture) -> None:
    model = Cut(lambda *_: False)
    optimizer = torch.optim.AdamW(model.parameters())
    with LayerScheduler(
        model, optimizer, Given((0, 1)), layers="blocks", num_active=2, period=2
    ) as scheduler:
        for _ in range(12):
            optimizer.step()
            scheduler.step()
    assert NAME not in {record.name for record in caplog.records}


def test_gradients_of_zero_are_gradients_and_a_check_lets_them_pass(caplog: pytest.LogCaptureFixture) -> None:
    model = make_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    with LayerScheduler(model, optimizer, "lisa", period=2, check=True) as scheduler:
        for step in range(12):  # a constant reward
            (model(**make_batch(step)).loss * 0).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert NAME not in {record.name for record in caplog.records}


def test_a_pooler_that_is_not_used_is_nothing_to_speak_of(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with LayerScheduler(model, optimizer, "lisa", num_active=1, period=1, check=True) as scheduler:
        for step in range(8):
            tokens = make_batch(step)["input_ids"] % 64
            model(input_ids=tokens).last_hidden_state.square().mean().backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert NAME not in {record.name for record in caplog.records}


@OLD_TRAINER
def test_a_check_goes_with_the_best_model_at_the_end(tmp_path: Any) -> None:
    rows = [{k: v[0].tolist() for k, v in make_batch(i, 1).items()} for i in range(8)]
    args = TrainingArguments(
        str(tmp_path),
        max_steps=5,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first is the "best", so that weights go back
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    callback = LayerSamplingCallback("lisa", period=2, check=True)
    trainer = Trainer(make_llama(), args, train_dataset=rows, eval_dataset=rows)
    callback.attach(trainer)
    trainer.train()
    assert trainer.state.best_global_step is not None and trainer.state.best_global_step < 5


@pytest.mark.parametrize("period", [1, 5])
def test_a_scheduler_that_steps_in_front_of_the_optimizer_is_refused(period: int) -> None:
    model = make_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with LayerScheduler(model, optimizer, "lisa", period=period) as scheduler:
        scheduler.step()  # nothing to lose
        model(**make_batch()).loss.backward()
        with pytest.raises(ConfigError, match="must step once after each optimizer step"):
            scheduler.step()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("options", [{}, {"embeddings": "freeze", "head": "freeze", "norm": "freeze"}])
def test_a_scheduler_that_steps_more_often_than_the_optimizer_is_refused(options: dict[str, Any]) -> None:
    """Outside of the `if` of gradient accumulation, or twice; what a loop leaves out on purpose is none of it."""
    model = make_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with LayerScheduler(model, optimizer, "lisa", period=5, **options) as scheduler:
        for _ in range(2):
            model(**make_batch()).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        scheduler.step()  # a batch without a step, and without gradients
        model(**make_batch()).loss.backward()
        with pytest.raises(ConfigError, match="no optimizer has stepped since"):
            scheduler.step()
        optimizer.step()
        scheduler.step()
        with pytest.raises(ConfigError, match="no optimizer has stepped since"):
            scheduler.step()
        optimizer.zero_grad()
        model(**make_batch()).loss.backward()
        trained = [p for p in model.parameters() if p.grad is not None]
        assert trained[0].grad is not None and trained[-1].grad is not None
        trained[-1].grad[0] = float("inf")  # of all gradients one is no number: the batch is left out
        scheduler.step()
        assert scheduler.state_dict()["steps"] == 5


@pytest.mark.parametrize("before", [0, 2])
def test_a_step_that_a_scaler_leaves_out_is_no_wrong_order(before: int) -> None:
    model = make_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with LayerScheduler(model, optimizer, "lisa", period=5) as scheduler:
        for number in range(before + 1):
            factor = 1e38 if number == before else 1.0
            (scaler.scale(model(**make_batch()).loss) * factor * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
        assert scheduler.state_dict()["steps"] == before + 1
