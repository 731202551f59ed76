from __future__ import annotations

import os
from typing import Any

import pytest

from layersample.config import TrainConfig, make_config
from layersample.errors import ConfigError
from layersample.training.sharding import as_launched, follow_launcher

LAUNCHED = {"ACCELERATE_DYNAMO_USE_DYNAMIC": "False", "ACCELERATE_MIXED_PRECISION": "no"}
FSDP = {**LAUNCHED, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def config(**options: Any) -> TrainConfig:
    return make_config(("test", options))


def test_what_was_left_out_comes_from_accelerate_s_file() -> None:
    assert follow_launcher(config(), {}) == follow_launcher(config(), LAUNCHED) == config()
    mixed = follow_launcher(config(steps=3), {**FSDP, "ACCELERATE_MIXED_PRECISION": "bf16"})
    assert (mixed.precision, mixed.shard, mixed.steps) == ("bf16-mixed", "fsdp2", 3)
    assert mixed.sharded_checkpoints
    assert not follow_launcher(
        config(), {**FSDP, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    ).sharded_checkpoints
    # What the Trainer leaves in the environment of its own process is no launcher's word.
    assert follow_launcher(config(), {"ACCELERATE_MIXED_PRECISION": "bf16"}) == config()


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (
            {"precision": "fp32"},
            {**LAUNCHED, "ACCELERATE_MIXED_PRECISION": "bf16"},
            "asks for precision bf16-mixed, but the run's own option is precision fp32",
        ),
        ({}, {**FSDP, "FSDP_VERSION": "1"}, "must ask for FSDP2 .* asks for version 1"),
        ({}, {**LAUNCHED, "ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed"),
        ({}, {**LAUNCHED, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "asks for a parallelism_config"),
        ({"frozen_weights": "nf4"}, FSDP, "frozen_weights needs whole weights on each GPU"),
        ({"precision": "bf16"}, FSDP, "choose precision bf16-mixed"),
        ({"step_in_backward": True, "clip": 0}, FSDP, "step_in_backward needs gradients that are whole"),
    ],
)
def test_what_does_not_go_together(
    options: dict[str, Any], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        follow_launcher(config(**options), environment)


def test_the_environment_is_as_it_was_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    before = dict(os.environ)
    with as_launched(config(shard="fsdp2", sharded_checkpoints=False)):
        assert os.environ["FSDP_VERSION"] == "2" and os.environ["ACCELERATE_USE_FSDP"] == "true"
        assert os.environ["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert dict(os.environ) == before
    with as_launched(config()):
        assert dict(os.environ) == before
