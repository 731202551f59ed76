"""The plug-in in axolotl's own manager and schema; ``.ci/doors`` installs axolotl, without what it trains with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    base: Any = pytest.importorskip("axolotl.integrations.base")
    from axolotl.integrations.config import merge_input_args

from layersample import ConfigError
from tests.integrations.test_doors import OPTIONS, assert_sampled, make_trainer

PLUGIN = "layersample.integrations.axolotl.LayerSamplingPlugin"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(base.PluginManager, "_instance", None)
    made = base.PluginManager.get_instance()
    made.register(PLUGIN)
    return made


def test_is_loaded_and_attaches(manager: Any, tmp_path: Path) -> None:
    assert list(manager.plugins) == [PLUGIN] and isinstance(manager.plugins[PLUGIN], base.BasePlugin)
    cfg = {"layer_sampling": OPTIONS}
    trainer = make_trainer(tmp_path)
    manager.post_trainer_create(cfg, trainer)
    trainer.train()
    assert_sampled(trainer)


def test_its_key_is_part_of_the_schema(manager: Any) -> None:
    for schema in merge_input_args():
        assert "layer_sampling" in schema.model_fields


def test_its_own_keys_are_those_that_are_refused(manager: Any) -> None:
    (_, schema) = merge_input_args()
    from layersample.integrations import axolotl

    assert set(axolotl._THEIRS) <= set(schema.model_fields)
    with pytest.raises(ConfigError, match="lisa_n_layers=2"):
        manager.plugins[PLUGIN].register({"lisa_n_layers": 2, "lisa_step_interval": 5})
