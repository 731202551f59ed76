"""The doors of axolotl, LLaMA-Factory and ms-swift, against packages with the calls that theirs have.

What each of the three fakes mirrors is named in it; none of the real ones installs without a GPU in minutes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from layersample import ConfigError
from layersample.cli import app as cli
from layersample.integrations.trainer_checkpoints import ProtectedCheckpoints
from tests.helpers import make_batch, make_llama, weights_of

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")

# axolotl 0.19, src/axolotl/integrations/base.py: class BasePlugin. It is loaded by load_plugin(): an import and getattr.
AXOLOTL = """
class BasePlugin:
    def __init__(self):
        pass
    def register(self, cfg):
        pass
    def get_input_args(self):
        return None
    def post_trainer_create(self, cfg, trainer):
        pass
"""
# LLaMA-Factory 0.9.5, src/llamafactory/train/tuner.py: run_exp; a trainer is made of the callbacks that it is given,
# with others of its own (train/sft/workflow.py).
TUNER = """
seen = []
def run_exp(args=None, callbacks=None):
    from transformers import TrainerCallback
    class LogCallback(TrainerCallback):
        pass
    callbacks.append(LogCallback())
    seen.append((args, callbacks))
    make(callbacks).train()
"""
# ms-swift 4.6, swift/callbacks/base.py: TrainerCallback, and swift/callbacks/mapping.py: callbacks_map.
SWIFT = """
from transformers import TrainerCallback as HfTrainerCallback
class TrainerCallback(HfTrainerCallback):
    def __init__(self, args, trainer):
        self.args = args
        self.trainer = trainer
class LISACallback(TrainerCallback):
    pass
callbacks_map = {'lisa': LISACallback}
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a package of one module, for one test."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    tops = []

    def install(module: str, text: str, distribution: str, version: str) -> None:
        *folders, name = module.split(".")
        place = tmp_path / "site"
        for folder in folders:
            place = place / folder
            place.mkdir(parents=True, exist_ok=True)
            (place / "__init__.py").touch()
        (place / f"{name}.py").write_text(text)
        told = tmp_path / "site" / f"{distribution.replace('-', '_')}-{version}.dist-info"
        told.mkdir()
        (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        importlib.invalidate_caches()
        tops.append(folders[0])

    ours = [f"layersample.integrations.{name}" for name in ("axolotl", "llamafactory", "ms_swift")]
    yield install
    for name in [*sys.modules]:
        if name.split(".")[0] in tops or name in ours:
            del sys.modules[name]


def make_trainer(output: Path, cls: type[Trainer] = Trainer, given: Any = None, **more: Any) -> Any:
    rows: Any = [{k: v[0].tolist() for k, v in make_batch(i, 1).items()} for i in range(8)]
    options: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": 4,
        "report_to": "none",
        "use_cpu": True,
    }
    options |= {"save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2, "disable_tqdm": True}
    arguments = TrainingArguments(**options, dataloader_pin_memory=False)
    for name, value in more.items():  # what a trainer of theirs adds to its arguments
        setattr(arguments, name, value)
    return cls(make_llama(), arguments, train_dataset=rows, callbacks=given)


def assert_sampled(trainer: Any, layers: int = 2) -> None:
    """A layer at a time has trained, by a callback that is attached."""
    start = make_llama().state_dict()
    changed = {
        name.split(".")[2]
        for name, weight in weights_of(trainer.model).items()
        if ".layers." in name and not torch.equal(weight, start[name])
    }
    assert len(changed) == layers, changed
    assert isinstance(getattr(trainer._save_checkpoint, "__self__", None), ProtectedCheckpoints), (
        "not attached"
    )


OPTIONS: dict[str, Any] = {"sampler": "cyclic", "num_active": 1, "period": 2, "seed": 1}


# axolotl


def load_plugin(package: Callable[..., None], text: str = AXOLOTL) -> Any:
    """As axolotl's load_plugin does."""
    package("axolotl.integrations.base", text, "axolotl", "0.19.0")
    module, _, name = "layersample.integrations.axolotl.LayerSamplingPlugin".rpartition(".")
    return getattr(importlib.import_module(module), name)()


def test_axolotl_attaches_to_its_trainer(package: Callable[..., None], tmp_path: Path) -> None:
    plugin = load_plugin(package)
    cfg = {"optimizer": "adamw_torch", "layer_sampling": OPTIONS}
    plugin.register(cfg)
    trainer = make_trainer(tmp_path)
    plugin.post_trainer_create(cfg, trainer)
    trainer.train()
    assert_sampled(trainer)


def test_axolotl_finds_the_plug_in_s_key(package: Callable[..., None]) -> None:
    """As merge_input_args() of src/axolotl/integrations/config.py does: by name, as one more base class."""
    module, _, name = load_plugin(package).get_input_args().rpartition(".")
    args = getattr(importlib.import_module(module), name)

    class AxolotlInputConfigBase(BaseModel):
        base_model: str

    config: Any = type("AxolotlInputConfig", (AxolotlInputConfigBase, args), {})
    read = config(base_model="x", layer_sampling=OPTIONS)
    assert read.model_dump()["layer_sampling"] == OPTIONS


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"lisa_n_layers": 2, "lisa_step_interval": 20}, "lisa_n_layers=2, lisa_step_interval=20"),
        ({"unfrozen_parameters": ["model.layers.2"]}, "unfrozen_parameters="),
        ({"optimizer": "q_galore_adamw8bit"}, "'q_galore_adamw8bit' projects gradients by itself"),
        ({"layer_sampling": {"perod": 2}}, "layer_sampling: Unknown option 'perod'"),
        ({"layer_sampling": "lisa"}, "layer_sampling: must hold options and their values, but holds 'lisa'"),
    ],
)
def test_axolotl_s_own_ways_are_refused(
    package: Callable[..., None], cfg: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_plugin(package).register({"layer_sampling": OPTIONS, **cfg})


def test_axolotl_must_be_there_and_new_enough(package: Callable[..., None]) -> None:
    with pytest.raises(ConfigError, match="pip install axolotl"):
        importlib.import_module("layersample.integrations.axolotl")
    old = AXOLOTL.replace("post_trainer_create", "something_else")
    with pytest.raises(
        ConfigError, match="axolotl 0.10 or later, but .* has no BasePlugin.post_trainer_create"
    ):
        load_plugin(package, old)


# LLaMA-Factory


def run(*arguments: str) -> None:
    result = CliRunner().invoke(cli.app, ["llamafactory", "train", *arguments])
    if result.exception:
        raise result.exception


def test_llamafactory_trains_with_the_callback_attached(package: Callable[..., None], tmp_path: Path) -> None:
    package("llamafactory.train.tuner", TUNER, "llamafactory", "0.9.5")
    tuner = importlib.import_module("llamafactory.train.tuner")
    made: list[Any] = []

    def make(callbacks: Any) -> Any:
        made.append(make_trainer(tmp_path, given=callbacks))
        return made[0]

    vars(tuner)["make"] = make
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"stage": "sft", "finetuning_type": "full", "layersample": OPTIONS}))
    init = Trainer.__init__
    run(str(path), "learning_rate=0.5", "layersample.num_active=2", "layersample.period=4")
    assert Trainer.__init__ is init
    args, callbacks = tuner.seen[0]
    assert args == {"stage": "sft", "finetuning_type": "full", "learning_rate": 0.5}
    assert callbacks[0].options.num_active == 2 and callbacks[0].options.seed == 1
    assert_sampled(made[0])


def test_llamafactory_leaves_other_trainers_alone(tmp_path: Path) -> None:
    from layersample.integrations.front_door import make_callback
    from layersample.integrations.llamafactory import attaching

    callback = make_callback(OPTIONS, "test")
    with attaching(callback):
        other, own = make_trainer(tmp_path), make_trainer(tmp_path, given=[callback])
    assert not hasattr(other._save_checkpoint.__self__, "verify")
    assert hasattr(own._save_checkpoint.__self__, "verify")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"finetuning_type": "freeze"}, "finetuning_type freeze trains the same layers"),
        ({"use_badam": True}, "LLaMA-Factory's own are set: use_badam=True"),
        ({"use_galore": "true", "use_apollo": True}, "use_galore='true', use_apollo=True"),
        ({"use_llama_pro": True}, "use_llama_pro=True"),
        ({"stage": "ppo"}, "stage ppo has a loop of its own"),
        ({"use_ray": True}, "use_ray trains elsewhere"),
        ({"layersample": {"sampler": "lise", "num_active": 0}}, "layersample: num_active"),
        ({"layersample": [1]}, "layersample: must hold options"),
    ],
)
def test_llamafactory_s_own_ways_are_refused(
    package: Callable[..., None], tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    package("llamafactory.train.tuner", TUNER, "llamafactory", "0.9.5")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"layersample": OPTIONS, "use_mca": False, **config}))
    with pytest.raises(ConfigError, match=message):
        run(str(path))


def test_llamafactory_must_be_there_and_new_enough(package: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("stage: sft\n")
    with pytest.raises(ConfigError, match="isn't installed: pip install llamafactory"):
        run(str(path))
    package("llamafactory.train.tuner", TUNER, "llamafactory", "0.8.3")
    with pytest.raises(ConfigError, match="0.9.0 or later, but 0.8.3 is installed"):
        run(str(path))
    with pytest.raises(ConfigError, match="there is no|could not be read|No such file"):
        run(str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import torchaudio_of_nobody",
            "needs isn't, or can't be imported: No module named 'torchaudio_of_nobody'",
        ),
        (
            "seen = []",
            "0.9.0 or later, but the one that is installed has no llamafactory.train.tuner.run_exp",
        ),
    ],
    ids=["lacks another", "too old"],
)
def test_llamafactory_that_can_not_be_imported(
    package: Callable[..., None], tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "run.yaml").write_text("stage: sft\n")
    package("llamafactory.train.tuner", text, "llamafactory", "0.9.5")
    with pytest.raises(ConfigError, match=message):
        run(str(tmp_path / "run.yaml"))


# ms-swift


class SwiftTrainer(Trainer):
    """As SwiftMixin of swift/trainers/mixin.py: callbacks are made of it before it is set up."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        place = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        self.state.last_model_checkpoint = str(place)  # type: ignore[attr-defined]
        super()._save_checkpoint(*args, **kwargs)

    def __init__(self, model: Any, args: Any, **kwargs: Any) -> None:
        from swift.callbacks.mapping import callbacks_map

        kwargs["callbacks"] = [callbacks_map[name](args, self) for name in args.callbacks]
        super().__init__(model, args, **kwargs)


def install_swift(package: Callable[..., None], version: str = "4.6.0") -> None:
    package("swift.callbacks.mapping", SWIFT, "ms-swift", version)
    sys.modules.pop("swift.callbacks", None)
    folder = Path(str(importlib.import_module("swift").__file__)).parent
    (folder / "callbacks" / "__init__.py").write_text("from .mapping import TrainerCallback, callbacks_map\n")


def test_ms_swift_attaches_once_its_trainer_is_set_up(package: Callable[..., None], tmp_path: Path) -> None:
    install_swift(package)
    from layersample.integrations.ms_swift import register

    register(**OPTIONS)
    trainer = make_trainer(tmp_path, SwiftTrainer, callbacks=["layersample"])
    trainer.train()
    assert_sampled(trainer)
    assert (
        sum(type(each).__name__ == "LayerSamplingCallback" for each in trainer.callback_handler.callbacks)
        == 1
    )


def test_ms_swift_finds_its_last_checkpoint(package: Callable[..., None], tmp_path: Path) -> None:
    install_swift(package)
    from layersample.integrations.ms_swift import register

    register(**OPTIONS)
    more = {"callbacks": ["layersample"], "save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer(tmp_path, SwiftTrainer, **more)
    trainer.train()
    assert Path(trainer.state.last_model_checkpoint) == tmp_path / "checkpoint-4"
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"callbacks": ["layersample", "lisa"]}, "--callbacks has both lisa"),
        ({"callbacks": ["layersample"], "use_galore": True}, "use_galore=True"),
        ({"callbacks": ["layersample"], "optimizer": "galore"}, "optimizer 'galore' projects"),
    ],
)
def test_ms_swift_s_own_ways_are_refused(
    package: Callable[..., None], tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    install_swift(package)
    from layersample.integrations.ms_swift import register

    register(**OPTIONS)
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, SwiftTrainer, **arguments)


def test_ms_swift_must_be_there_and_new_enough(package: Callable[..., None]) -> None:
    from layersample.integrations.ms_swift import register

    with pytest.raises(ConfigError, match="isn't installed: pip install ms-swift"):
        register()
    install_swift(package, "3.9.0")
    with pytest.raises(ConfigError, match="4.0 or later, but 3.9.0 is installed"):
        register()


def test_ms_swift_s_options_are_checked_when_they_are_given(package: Callable[..., None]) -> None:
    install_swift(package)
    from layersample.integrations.ms_swift import register

    with pytest.raises(ConfigError, match="register: Unknown option 'perod'"):
        register(perod=2)


# The examples


def test_the_examples_are_what_the_doors_take(package: Callable[..., None]) -> None:
    plugin = load_plugin(package)
    plugin.register(yaml.safe_load((EXAMPLES / "axolotl" / "lisa.yaml").read_text()))
    from layersample.integrations import llamafactory
    from layersample.integrations.front_door import make_callback

    config = yaml.safe_load((EXAMPLES / "llamafactory" / "lisa.yaml").read_text())
    make_callback(config.pop("layersample"), "layersample")
    llamafactory._check(config)
    install_swift(package)
    text = (EXAMPLES / "ms_swift" / "plugin.py").read_text()
    exec(compile(text, "plugin.py", "exec"), {"__name__": "plugin"})
    assert "layersample" in importlib.import_module("swift.callbacks").callbacks_map
