from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from layersample import LayerSamplingCallback
from layersample.integrations.trainer_loss import has_own_loss, logits_are_watched
from tests.helpers import weights_of
from tests.integrations.test_transformers import make_trainer


def mean_of_logits(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    return model(**inputs).logits.float().logsumexp(-1).mean()


class OwnLoss(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return mean_of_logits(*args, **kwargs)


def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    assert not has_own_loss(make_trainer(tmp_path, None))
    assert has_own_loss(make_trainer(tmp_path, None, trainer=OwnLoss))
    assert has_own_loss(make_trainer(tmp_path, None, label_smoothing_factor=0.1))
    put_on = make_trainer(tmp_path, None)
    put_on.compute_loss = mean_of_logits  # type: ignore[method-assign]
    assert has_own_loss(put_on)


def test_a_loss_that_was_put_on_the_trainer_gets_all_logits(tmp_path: Path) -> None:
    def train(*, attached: bool) -> dict[str, torch.Tensor]:
        trainer = make_trainer(tmp_path, None, max_steps=2)
        trainer.compute_loss = mean_of_logits  # type: ignore[method-assign]
        if attached:
            LayerSamplingCallback("lisa", num_active=4).attach(trainer)
        trainer.train()
        return weights_of(trainer.model)

    plain, sampled = train(attached=False), train(attached=True)
    assert all(torch.equal(plain[name], sampled[name]) for name in plain)


@pytest.mark.parametrize("where", ["head", "model"])
def test_a_hook_sees_the_logits_that_there_are(tmp_path: Path, where: str) -> None:
    trainer = make_trainer(tmp_path, None, max_steps=1)
    LayerSamplingCallback("lisa").attach(trainer)
    assert not logits_are_watched(trainer)
    shapes = []

    def watch(module: Any, args: Any, output: Any) -> None:
        shapes.append(tuple((output if where == "head" else output.logits).shape))

    model: Any = trainer.model
    (model.lm_head if where == "head" else model).register_forward_hook(watch)
    assert logits_are_watched(trainer)
    trainer.train()
    assert shapes and set(shapes) == {(2, 12, 260)}
