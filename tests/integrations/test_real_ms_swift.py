"""The callback among ms-swift's own, made as its trainer makes them; ``.ci/doors`` installs ms-swift, without its models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mixin: Any = pytest.importorskip("swift.trainers.mixin")
    from swift.callbacks import TrainerCallback, callbacks_map

from layersample import ConfigError
from layersample.integrations.ms_swift import register
from tests.integrations.test_doors import OPTIONS, assert_sampled, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class SwiftTrainer(Trainer):
    """Makes its callbacks by ms-swift's own function, before it is set up."""

    def __init__(self, model: Any, args: Any, **kwargs: Any) -> None:
        super().__init__(model, args, **{**kwargs, "callbacks": mixin.SwiftMixin._get_callbacks(self, args)})


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(callbacks_map, "layersample", None)


def test_attaches_once_the_trainer_is_set_up(tmp_path: Path) -> None:
    register(**OPTIONS)
    assert issubclass(callbacks_map["layersample"], TrainerCallback)
    trainer = make_trainer(tmp_path, SwiftTrainer, callbacks=["layersample"], max_epochs=None)
    trainer.train()
    assert_sampled(trainer)


def test_is_refused_beside_its_own(tmp_path: Path) -> None:
    register(**OPTIONS)
    with pytest.raises(ConfigError, match="--callbacks has both lisa"):
        make_trainer(tmp_path, SwiftTrainer, callbacks=["layersample", "lisa"])
