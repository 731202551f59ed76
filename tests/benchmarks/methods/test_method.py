from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from layersample import ConfigError, LayerSampler, register
from layersample.config import TrainConfig
from layersample_benchmarks.methods import catalog, method
from layersample_benchmarks.methods.catalog import default_methods, get_method
from layersample_benchmarks.methods.method import Method, Prepared, register_baseline


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.list_baselines()
    monkeypatch.setattr(method, "BASELINES", dict(method.BASELINES))


def test_every_sampler_with_and_without_projection_and_every_baseline() -> None:
    names = default_methods()
    assert {"full", "lisa", "owlore", "lisa+galore", "full+galore", "lora", "lora-fa", "lora-fa-peft"} <= set(
        names
    )
    assert {"badam", "lisa-published", "galore-published"} <= set(catalog.list_baselines())
    assert len(names) == len(set(names))
    assert all(get_method(name).summary for name in names)


def test_a_sampler_of_ones_own_is_a_method() -> None:
    @register("mine")
    class Mine(LayerSampler):
        """Train the first layer."""

        def sample(self, context: Any) -> list[int]:
            return [0]

    assert get_method("mine").summary == "Train the first layer."
    assert "mine+galore" in default_methods()


def test_a_baseline_of_ones_own_is_a_method() -> None:
    @register_baseline("nothing", rate_scale=2.0)  # type: ignore[untyped-decorator]
    def nothing(model: nn.Module, config: TrainConfig) -> Prepared:
        """Change nothing."""
        return Prepared(model)

    assert get_method("nothing").summary == "Change nothing."
    assert get_method("nothing").rate_scale == 2.0
    with pytest.raises(
        ValueError, match="baseline name 'lora' is taken by layersample_benchmarks.methods.baselines.lora"
    ):
        register_baseline("lora")(nothing)


def test_a_baseline_never_stands_for_a_sampler() -> None:
    @register_baseline("lisa")  # type: ignore[untyped-decorator]
    def other(model: nn.Module, config: TrainConfig) -> Prepared:
        """Change nothing."""
        return Prepared(model)

    with pytest.raises(ConfigError, match="a name that no sampler has, but 'lisa' is both"):
        get_method("lisa")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loora", "Unknown method 'loora'. Did you mean 'lora'"),
        ("liza", "Unknown method 'liza'. Did you mean 'lisa'"),
        ("lisa+galor", "Unknown projection 'galor'. Did you mean 'galore'"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        get_method(name)


def test_an_extra_that_is_not_installed_is_named_with_its_pip_line() -> None:
    method = Method(
        "other", "", lambda model, config: Prepared(model), extra=("no_such_package", "baselines")
    )
    with pytest.raises(
        ConfigError, match=r"'other' needs the package no_such_package.*layersample\[baselines\]"
    ):
        method.check_installed()
    assert not method.is_installed
