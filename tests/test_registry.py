from __future__ import annotations

from pathlib import Path

import pytest

from layersample import (
    ConfigError,
    LayerSampler,
    SamplingContext,
    create_sampler,
    list_samplers,
    register,
)
from layersample.registry import SAMPLERS, describe, describe_options, load_plugin


def make(module: str = __name__) -> type[LayerSampler]:
    class Mine(LayerSampler):
        """Pick the first layer.

        It never picks another one.

        Args:
            speed: Layers a period.
            mode: How to pick.
        """

        def __init__(self, *, speed: float = 1.0, mode: str = "first") -> None:
            if speed > 9:
                raise ValueError(f"speed must be at most 9, but got {speed}.")
            self.speed, self.mode = speed, mode

        def sample(self, context: SamplingContext) -> list[int]:
            return [0]

    Mine.__module__ = module
    return Mine


def test_a_registered_sampler_is_found_by_name() -> None:
    cls = register("mine")(make())
    assert SAMPLERS.get("mine") is cls
    assert isinstance(create_sampler("mine"), cls)
    assert "mine" in list_samplers()


def test_a_notebook_cell_may_run_twice() -> None:
    register("mine")(make())
    again = register("mine")(make())
    assert SAMPLERS.get("mine") is again


def test_another_class_may_not_take_a_name() -> None:
    register("mine")(make())
    with pytest.raises(ValueError, match="'mine' is taken by .*test_registry.make.*Mine; choose another one"):
        register("mine")(make("elsewhere"))


def test_only_samplers_are_registered() -> None:
    with pytest.raises(TypeError, match="must be a subclass of LayerSampler, but got <class 'int'>"):
        register("number")(int)  # type: ignore[type-var]


def test_unknown_name_lists_all_and_the_closest() -> None:
    with pytest.raises(
        ConfigError, match="Unknown sampler 'cylic'. Did you mean 'cyclic'.* There are: cyclic, full, lisa, "
    ):
        SAMPLERS.get("cylic")


def test_options_are_converted_and_checked() -> None:
    register("mine")(make())
    assert create_sampler("mine", {"speed": "0.5"}).speed == 0.5  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="Option 'speed' of sampler 'mine': .*number.* but got 'fast'"):
        create_sampler("mine", {"speed": "fast"})
    with pytest.raises(ConfigError, match="Unknown option of sampler 'mine' 'sped'. Did you mean 'speed'"):
        create_sampler("mine", {"sped": 1})
    with pytest.raises(ConfigError, match="Sampler 'mine': speed must be at most 9, but got 10"):
        create_sampler("mine", {"speed": 10})


def test_descriptions_come_from_the_docstring() -> None:
    assert describe(make()) == ("Pick the first layer.", "It never picks another one.")
    speed, mode = describe_options(make())
    assert (speed.name, speed.type, speed.default, speed.description) == (
        "speed",
        "float",
        "1.0",
        "Layers a period.",
    )
    assert mode.default == "'first'"


PLUGIN = """
from layersample import LayerSampler, register

@register("even")
class Even(LayerSampler):
    '''Train even layers.'''
    def sample(self, context):
        return range(0, context.num_layers, 2)
"""


def test_a_plugin_registers_its_samplers_and_may_be_loaded_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    load_plugin(path)
    load_plugin(path)
    assert list(create_sampler("even").sample(SamplingContext(("a", "b", "c"), 1))) == [0, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLUGIN + "\n1 / 0\n", "line 10, raised ZeroDivisionError: division by zero"),
        ("x = (\n", "line 1, raised SyntaxError"),
        ("import no_such_module\n", "line 1, raised ModuleNotFoundError"),
    ],
)
def test_a_plugin_that_raises_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"mine.py, {message}"):
        load_plugin(path)


def test_a_plugin_must_be_there_and_be_python(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must exist, but there is no file 'no.py'"):
        load_plugin("no.py")
    (tmp_path / "mine.txt").write_text(PLUGIN)
    with pytest.raises(ConfigError, match=r"must be a Python file \(.py\), but got"):
        load_plugin(tmp_path / "mine.txt")
