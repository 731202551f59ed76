from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from layersample import ConfigError, find_layers
from layersample.metrics import (
    METRICS,
    DegenerateMatrixError,
    layer_metrics,
    measure_weight,
    spectrum,
    weight_matrices,
)

Make = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("cache", [True, False])
def test_each_matrix_is_measured(make_model: Make, family: str, cache: bool) -> None:
    model = make_model(family, **({"num_local_experts": 8} if family == "mixtral" else {}))
    found = layer_metrics(model, metrics=tuple(METRICS), cache=cache)
    for row, matrix in zip(found.matrices, weight_matrices(model), strict=True):
        assert (row.name, row.layer, row.shape) == (matrix.name, matrix.layer, tuple(matrix.weight.shape))
        assert row.values == measure_weight(matrix.weight, METRICS)
        assert not row.problems


def test_by_layer_is_the_mean_over_its_matrices(make_model: Make) -> None:
    model = make_model()
    found = layer_metrics(model)
    layers = [layer.name for layer in find_layers(model).layers]
    assert list(found.by_layer("alpha")) == layers
    own = [row.values["hill"] for row in found.matrices if row.layer == layers[1]]
    assert found.by_layer("hill")[layers[1]] == pytest.approx(sum(own) / 7)
    with pytest.raises(ConfigError, match="Unknown measured metric 'alpha_hat'"):
        found.by_layer("alpha_hat")


def test_the_second_time_comes_from_the_cache(
    make_model: Make, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    first = layer_metrics(model)
    assert len(list(own_cache.glob("*.json"))) == 14 * 3
    monkeypatch.setattr(
        "layersample.metrics.model.compute_eigenvalues", lambda weight: pytest.fail("measured")
    )
    assert layer_metrics(model) == first
    with pytest.raises(pytest.fail.Exception):
        layer_metrics(model, cache=False)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(pytest.fail.Exception):
        layer_metrics(model)


def test_a_corrupt_cache_file_is_measured_again_and_mended(
    make_model: Make, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    first = layer_metrics(model)
    file = next(own_cache.glob("*.json"))
    good = file.read_text()
    file.write_text(good[:20])
    assert layer_metrics(model) == first
    assert "Measuring again" in caplog.text
    assert file.read_text() == good


def test_without_the_cache_nothing_is_written(make_model: Make, own_cache: Path) -> None:
    layer_metrics(make_model(), cache=False)
    assert not own_cache.exists()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_weightwatcher_agrees_and_leaves_no_trace(make_model: Make, family: str) -> None:
    model = make_model(family, **({"num_local_experts": 8} if family == "mixtral" else {}))
    root = logging.getLogger()
    logging.disable(logging.DEBUG)  # the user's own
    before = list(root.handlers), root.level, root.manager.disable
    reference = layer_metrics(model, metrics=tuple(METRICS), backend="weightwatcher", embeddings=True)
    own = layer_metrics(model, metrics=tuple(METRICS), embeddings=True)
    for ours, theirs in zip(own.matrices, reference.matrices, strict=True):
        assert (ours.name, ours.shape) == (theirs.name, theirs.shape)
        assert ours.values == pytest.approx(theirs.values, abs=1e-6, rel=1e-9)
    assert not [name for name, module in model.named_modules() if hasattr(module, "longname")]
    after = list(root.handlers), root.level, root.manager.disable
    logging.disable(logging.NOTSET)
    assert after == before


def test_embeddings_of_any_size_with_weightwatcher_too() -> None:
    from layersample.metrics.reference import measure_with_weightwatcher

    weight = torch.randn(50_100, 12)
    [(values, problems)] = measure_with_weightwatcher([weight], ["alpha", "hill"])
    assert not problems
    assert measure_weight(weight, ["alpha", "hill"]) == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("backend", ["own", "weightwatcher"])
def test_a_degenerate_matrix_is_named_and_left_out(
    make_model: Make, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    found = layer_metrics(model, metrics=("alpha",), backend=backend)  # type: ignore[arg-type]
    bad = [row for row in found.matrices if row.problems]
    assert [row.name for row in bad] == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    assert not any(row.values for row in bad) and all(row.values for row in found.matrices if row not in bad)
    assert "NaN" in bad[1].problems["alpha"]
    assert "model.layers.0.mlp.up_proj.weight has no alpha" in caplog.text
    assert all(value > 1 for value in found.by_layer("alpha").values())


def test_a_layer_with_nothing_to_measure_is_named(make_model: Make) -> None:
    model = make_model()
    with torch.no_grad():
        for parameter in model.model.layers[1].parameters():
            parameter.zero_()
    with pytest.raises(
        DegenerateMatrixError, match=r"at least one matrix of model\.layers\.1 .* all of them are"
    ):
        layer_metrics(model).by_layer("alpha")


def test_progress_and_a_few_layers(make_model: Make) -> None:
    model = make_model()
    layers = find_layers(model)
    seen: list[tuple[int, int]] = []
    few = layer_metrics(
        model, replace(layers, layers=layers.layers[:1]), progress=lambda *counts: seen.append(counts)
    )
    assert {row.layer for row in few.matrices} == {"model.layers.0"}
    assert seen == [(done, 7) for done in range(1, 8)]


def test_bad_options(make_model: Make) -> None:
    with pytest.raises(ConfigError, match="Unknown backend 'powerlaw'"):
        layer_metrics(make_model(), backend="powerlaw")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Unknown metric 'beta'"):
        layer_metrics(make_model(), metrics=("beta",))


def test_a_quantized_weight_is_named(make_model: Make) -> None:
    model = make_model()
    packed = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.up_proj.weight = packed
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj\.weight: .* torch\.uint8: dequantize"):
        layer_metrics(model)


def test_the_model_is_not_changed(make_model: Make) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layer_metrics(model)
    layer_metrics(model, backend="weightwatcher")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad


def test_the_function_is_not_hidden_by_its_module() -> None:
    import layersample.metrics.spectrum  # noqa: F401
    from layersample import metrics

    assert metrics.spectrum is spectrum and metrics.__all__ == sorted(metrics.__all__, key=_ruff_order)


def _ruff_order(name: str) -> tuple[int, str]:
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, name
