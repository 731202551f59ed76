"""The samplers that weigh layers: where their weights come from, and what they refuse."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from layersample import ConfigError, LayerScheduler, Measurement, SamplingContext, create_sampler, find_layers
from layersample.files import cache_folder
from layersample.metrics import layer_metrics, lora_norms, outlier_ratios, random_hill
from tests.helpers import make_batch, make_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of transformers

# OwLore's published values of LLaMA2-7B, M=13 (metric_cache/llama2_7b_ratio_13.txt of its repository), 4 digits.
LLAMA2_7B = (
    *(0.2678, 0.2953, 0.1274, 0.1145, 0.09875, 0.08837, 0.08784, 0.08377, 0.08014, 0.07218, 0.07066),
    *(0.06965, 0.06296, 0.05908, 0.05522, 0.05372, 0.04683, 0.03923, 0.03359, 0.03398, 0.03159, 0.02788),
    *(0.02784, 0.02294, 0.02543, 0.02092, 0.02421, 0.01818, 0.01838, 0.02085, 0.02407, 0.08246),
)


def measured(
    name: str, options: dict[str, Any], model: nn.Module, *, batches: bool = True, num_active: int = 2
) -> Any:
    sampler = create_sampler(name, options)
    found = find_layers(model)
    names = tuple(layer.name for layer in found.layers)
    give = (lambda: [make_batch(i) for i in range(3)]) if batches else None
    sampler.measure(Measurement(model, found, names, num_active, names, give))
    return sampler


def context(model: nn.Module, num_active: int = 2) -> SamplingContext:
    return SamplingContext(tuple(layer.name for layer in find_layers(model).layers), num_active)


def test_owlore_s_published_values_give_its_published_probabilities() -> None:
    sampler = create_sampler("prior", {"weights": list(LLAMA2_7B)})
    names = SamplingContext(tuple(f"model.layers.{i}" for i in range(32)), 5)
    probabilities = sampler.probabilities(names)  # type: ignore[attr-defined]
    assert [probabilities[i] for i in (0, 1, 31)] == pytest.approx([0.1225, 0.1351, 0.0377], abs=5e-5)
    # What the draw really does to them: not five times that.
    inclusion = sampler.inclusion_probabilities(names)
    assert inclusion is not None and 5 * probabilities[1] - inclusion[1] > 0.1


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("increase", [1, 2, 3, 4]),
        ("decrease", [4, 3, 2, 1]),
        ("middle", [1, 2, 2, 1]),
        ("upper", [0, 0, 1, 1]),
    ],
)
def test_prior_shapes(shape: str, expected: list[float]) -> None:
    sampler = create_sampler("prior", {"weights": shape})
    assert sampler.weights(context(make_llama())) == expected  # type: ignore[attr-defined]


def test_prior_takes_numbers_and_checks_them() -> None:
    four = context(make_llama())
    assert sorted(create_sampler("prior", {"weights": [0, 1, 0, 1]}).sample(four)) == [1, 3]
    with pytest.raises(ValueError, match="must give 4 weights, one a layer, but gave 2"):
        create_sampler("prior", {"weights": [1, 2]}).sample(four)
    with pytest.raises(ConfigError, match="weights"):
        create_sampler("prior", {"weights": "sideways"})
    with pytest.raises(ConfigError, match="weights"):
        create_sampler("prior")


def test_outliers_of_owlore_are_owl_s_layer_outlier_distribution() -> None:
    model = make_llama()
    batches = [make_batch(i) for i in range(3)]
    sampler = measured("owlore", {"threshold": 3.0, "num_batches": 2}, model)
    ratios = outlier_ratios(model, batches[:2], thresholds=(3.0,))
    assert sampler.weights(context(model)) == [by_threshold[3.0] for by_threshold in ratios.values()]


def test_where_nothing_exceeds_m_the_largest_that_serves_is_taken_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        sampler = measured("owlore", {"threshold": 1e6}, make_llama())
    assert "At M=1e+06 too few of the 4 layers have outliers to draw from; M=" in caplog.text
    assert sum(sampler.weights(context(make_llama()))) > 0
    assert sampler.state_dict()["threshold"] in (3.0, 5.0, 7.0, 10.0, 13.0)


def test_a_heavier_tail_is_drawn_more_often() -> None:
    model = make_llama()
    sampler = measured("owlore", {"metric": "alpha"}, model, batches=False)
    alphas = list(layer_metrics(model, metrics=("alpha",)).by_layer("alpha").values())
    assert sampler.weights(context(model)) == pytest.approx([1 / alpha for alpha in alphas])


@pytest.mark.parametrize("baseline", ["module", "random"])
def test_hill_compares_like_with_like(baseline: str) -> None:
    model = make_llama()
    sampler = measured("owlore", {"metric": "hill", "baseline": baseline}, model, batches=False)
    rows = layer_metrics(model, metrics=("hill",)).matrices
    expected = []
    for layer in (layer.name for layer in find_layers(model).layers):
        ratios = []
        for row in (r for r in rows if r.layer == layer):
            own = row.name.removeprefix(layer)
            alike = [r.values["hill"] for r in rows if r.name.removeprefix(r.layer) == own]
            base = random_hill(row.shape) if baseline == "random" else 1.0
            mean = sum(v / base for v in alike) / len(alike)
            ratios.append(
                row.values["hill"] / base / mean if baseline == "module" else row.values["hill"] / base
            )
        expected.append(len(ratios) / sum(ratios))
    assert sampler.weights(context(model)) == pytest.approx(expected)


def test_only_layers_that_changed_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import layersample_strategies.owlore as module

    seen: list[list[str]] = []

    def watch(model: nn.Module, layers: Any, metrics: Any, **options: Any) -> Any:
        seen.append([layer.name for layer in layers.layers])
        return layer_metrics(model, layers, metrics, **options)

    monkeypatch.setattr(module, "layer_metrics", watch)
    model = make_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = LayerScheduler(
        model, optimizer, "owlore", period=1, sampler_options={"metric": "alpha", "every": 2}
    )
    active: set[str] = set()
    for step in range(2):
        active |= set(scheduler.active_layers)
        model(**make_batch(step)).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert len(seen) == 2 and len(seen[0]) == 4
    assert set(seen[1]) == active


@pytest.mark.parametrize("metric", ["alpha", "hill"])
def test_only_the_first_measurement_is_cached(metric: str) -> None:
    model = make_llama()
    sampler = create_sampler("owlore", {"metric": metric, "every": 1})
    found = find_layers(model)
    names = tuple(layer.name for layer in found.layers)
    counts = []
    for _ in range(2):
        sampler.measure(Measurement(model, found, names, 2, names))
        counts.append(len(list((cache_folder() / "metrics").iterdir())))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(torch.rand_like(parameter))
    assert counts == [4 * 7, 4 * 7]  # the matrices of all layers, as they were at first


def save_adapter(folder: Path, model: nn.Module, scale: float = 1.0, **options: Any) -> None:
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    peft_model.save_pretrained(str(folder))


@pytest.mark.parametrize("measure", ["ratio", "delta", "merged"])
def test_lora_norms_from_a_folder(tmp_path: Path, measure: str) -> None:
    save_adapter(tmp_path, make_llama())
    model = make_llama()
    sampler = measured("lora_norm", {"adapter": str(tmp_path), "measure": measure}, model, batches=False)
    norms = lora_norms(tmp_path, model).values()
    values = [n.merged / n.base if measure == "merged" else getattr(n, measure) for n in norms]
    assert sampler.weights(context(model)) == pytest.approx(values)


def test_lora_norms_from_a_live_model() -> None:
    model = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    sampler = measured("lora_norm", {"measure": "delta"}, model, batches=False)
    assert sampler.weights(context(model)) == pytest.approx([n.delta for n in lora_norms(model).values()])


def test_an_adapter_of_another_model_is_named(tmp_path: Path) -> None:
    other = make_llama(6)
    save_adapter(tmp_path, other)
    with pytest.raises(ConfigError, match=r"model.layers.4"):
        measured("lora_norm", {"adapter": str(tmp_path)}, make_llama(), batches=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_norm", "needs an adapter folder .* a PeftModel, or batches"),
        ("owlore", "needs? .*calibration|calibration batches, but got none"),
    ],
)
def test_what_needs_data_says_so(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measured(name, {}, make_llama(), batches=False)


def test_an_empty_calibration_set_is_refused() -> None:
    model = make_llama()
    found = find_layers(model)
    names = tuple(layer.name for layer in found.layers)
    for name in ("owlore", "lora_norm"):
        with pytest.raises(ConfigError, match="at least one"):
            create_sampler(name).measure(Measurement(model, found, names, 2, names, lambda: []))


def test_a_sampled_embedding_gets_the_mean_weight() -> None:
    model = make_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = LayerScheduler(
        model, optimizer, "owlore", sampler_options={"metric": "alpha"}, embeddings="sample"
    )
    inclusion = scheduler.inclusion_probabilities
    assert inclusion is not None and len(inclusion) == 5
    assert min(inclusion[1:]) < inclusion[0] < max(inclusion[1:])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("owlore", {"metric": "beta"}, "metric"),
        ("owlore", {"threshold": 0}, "threshold must be above 0, but got 0"),
        ("owlore", {"num_batches": 0}, "num_batches must be at least 1, but got 0"),
        ("lora_norm", {"probe_rank": 0}, "probe_rank must be at least 1, but got 0"),
        ("lora_norm", {"measure": "size"}, "measure"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_sampler(name, options)


def test_resumes_with_the_weights_that_were_measured() -> None:
    def fresh(state: Any = None) -> tuple[nn.Module, LayerScheduler]:
        model = make_llama()
        scheduler = LayerScheduler(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-2),
            "lora_norm",
            period=1,
            sampler_options={"probe_steps": 2},
            batches=[make_batch(i) for i in range(2)] if state is None else None,
            state_dict=state,
        )
        return model, scheduler

    _, whole = fresh()
    for _ in range(3):
        whole.step()
    _, again = fresh(whole.state_dict())  # without batches: nothing is measured again
    for _ in range(4):
        whole.step()
        again.step()
        assert again.active == whole.active
        assert again.inclusion_probabilities == whole.inclusion_probabilities
