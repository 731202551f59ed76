from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from layersample import (
    ConfigError,
    LayerSampler,
    MeasuredSampler,
    Measurement,
    SamplingContext,
    create_projection,
    create_sampler,
    list_projections,
    list_samplers,
    register,
    register_projection,
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
        register("number")(int)


def test_unknown_name_lists_all_and_the_closest() -> None:
    with pytest.raises(
        ConfigError,
        match="Unknown sampler 'cylic'. Did you mean 'cyclic'.* There are: .*cyclic, .*full, .*lisa, ",
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


@pytest.mark.parametrize("kind", [list_samplers, list_projections])
def test_a_built_in_strategy_has_a_signature_of_keyword_only_options(kind: Any) -> None:
    built_in = {n: cls for n, cls in kind().items() if cls.__module__.startswith("layersample_strategies")}
    assert built_in
    for cls in built_in.values():
        parameters = inspect.signature(cls).parameters
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values())
        options = describe_options(cls)
        assert {option.name for option in options} == set(parameters)
        assert [option.name for option in options if not option.description] == []


@dataclass(kw_only=True, eq=False)
class Greedy(MeasuredSampler):
    """Draw the layers with most weights.

    Args:
        power: Exponent of the scores.
        shift: What is added to them.
    """

    power: float = 2.0
    shift: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power <= 0:
            raise ValueError(f"power must be above 0, but got {self.power}.")

    def measure(self, measurement: Measurement) -> None:
        self.scores = dict.fromkeys(measurement.layers, self.power)


def test_a_subclass_has_the_options_of_its_base_without_naming_them() -> None:
    register("greedy")(Greedy)
    # The types of inherited options are names of other modules.
    options = {"temperature": "0.5", "draw": "systematic", "every": "3", "power": "4"}
    sampler: Any = create_sampler("greedy", options)
    assert (sampler.temperature, sampler.draw, sampler.measure_every, sampler.power) == (
        0.5,
        "systematic",
        3,
        4.0,
    )
    for option, value in (("draw", "sytematic"), ("every", "often"), ("shift", "far")):
        with pytest.raises(ConfigError, match=f"Option '{option}.*' of sampler 'greedy': .*{value}"):
            create_sampler("greedy", {option: value})
    for option, text in (("power", "power must be above 0"), ("temperature", "temperature must be finite")):
        with pytest.raises(ConfigError, match=f"Sampler 'greedy': {text}"):
            create_sampler("greedy", {option: -1})
    described = {option.name: option for option in describe_options(Greedy)}
    assert list(described) == [
        "power",
        "shift",
        "every",
        "temperature",
        "min_probability",
        "draw",
        "cost",
        "cost_tokens",
    ]
    assert described["every"].description.startswith("Periods between measurements")
    assert described["draw"].type == "Literal['sequential', 'systematic']"


def test_a_subclass_of_a_strategy_whose_option_is_called_as_its_method() -> None:
    @dataclass(kw_only=True, eq=False)
    class Steeper(list_samplers()["prior"]):  # type: ignore[misc]
        """Weigh layers more."""

    @dataclass(kw_only=True, eq=False)
    class Slower(list_projections()["galore"]):  # type: ignore[misc]
        """Look for a new basis seldom."""

        update_gap: int = 1000

    register("steeper")(Steeper)
    register_projection("slower")(Slower)
    sampler: Any = create_sampler("steeper", {"weights": "increase", "temperature": 2})
    assert sampler.weights(SamplingContext(("a", "b"), 1)) == [1.0, 2.0]
    with pytest.raises(
        ConfigError,
        match="Option 'weights' of sampler 'steeper': .* valid list, or: .*'increase'.*, but got 'up'",
    ):
        create_sampler("steeper", {"weights": "up"})
    with pytest.raises(ConfigError, match="Sampler 'steeper' needs the option 'weights'"):
        create_sampler("steeper")
    projection: Any = create_projection("slower", {"basis": "svd", "rank": "3"})
    assert (projection.kind, projection.rank, projection.update_gap) == ("svd", 3, 1000)


def test_constructors_of_ones_own_go_on_working() -> None:
    class OneArgument(MeasuredSampler):
        """Measure one thing.

        Args:
            depth: How deep to look.
        """

        def __init__(self, *, depth: int = 3) -> None:
            super().__init__(temperature=2.0, every=depth)
            self.depth = depth

        def measure(self, measurement: Measurement) -> None:
            self.scores = {}

    class NoConstructor(OneArgument):
        """As it is."""

    register("one")(OneArgument)
    register("none")(NoConstructor)
    for name in ("one", "none"):
        sampler: Any = create_sampler(name, {"depth": "4"})
        assert (sampler.depth, sampler.measure_every, sampler.temperature) == (4, 4, 2.0)
        assert [option.name for option in describe_options(list_samplers()[name])] == ["depth"]
        with pytest.raises(ConfigError, match="Unknown option of sampler .* 'temperature'"):
            create_sampler(name, {"temperature": 1.0})


def test_a_fault_of_a_constructor_is_not_taken_for_the_users() -> None:
    class Broken(LayerSampler):
        """Add what can't be added."""

        def __init__(self, *, depth: int = 1) -> None:
            self.depth = depth + None  # type: ignore[operator]

        def sample(self, context: SamplingContext) -> list[int]:
            return [0]

    register("broken")(Broken)
    with pytest.raises(TypeError, match="unsupported operand") as caught:
        create_sampler("broken")
    assert any("constructor of sampler 'broken'" in note for note in caught.value.__notes__)


def test_an_annotation_that_names_nothing() -> None:
    class Lost(LayerSampler):
        """Name a type that isn't there."""

        def __init__(self, *, depth: Deep = 1) -> None:  # type: ignore[name-defined]  # noqa: F821
            self.depth = depth

        def sample(self, context: SamplingContext) -> list[int]:
            return [0]

    register("lost")(Lost)
    with pytest.raises(ConfigError, match="must have annotations that can be looked up, but: name 'Deep'"):
        create_sampler("lost", {"depth": 1})


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
