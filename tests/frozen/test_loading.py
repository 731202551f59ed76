"""Models that are loaded rounded, or don't fit the host; metrics that see through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from layersample import ConfigError, LayerScheduler, load_frozen, metrics
from layersample.frozen.weights import find_frozen_weights
from tests.helpers import Given, make_batch, make_llama, weights_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_llama(3, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_is_loaded_rounded_trained_and_saved_exactly(folder: Path, tmp_path: Path) -> None:
    before = weights_of(make_llama(3, dtype=torch.bfloat16))
    model: Any = load_frozen(folder, frozen_weights="int8", device="cpu")
    frozen = find_frozen_weights(model)
    assert frozen is not None and frozen.host_bytes == 0 and frozen.device_bytes > 0
    assert all(model.get_parameter(name).untyped_storage().nbytes() == 2 for name in frozen.names)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for wrong in (None, "nf4"):
        with pytest.raises(ConfigError, match=r"must be made with frozen_weights='int8', but got"):
            LayerScheduler(model, optimizer, Given((1,)), frozen_weights=wrong)
    with LayerScheduler(model, optimizer, Given((1,)), num_active=1, frozen_weights="int8"):
        model(**make_batch()).loss.backward()
        optimizer.step()
    assert frozen.host_bytes == sum(before[n].nbytes for n in frozen.names if ".layers.1." in n)
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, before[name]) == (".layers.0." in name or ".layers.2." in name)


@pytest.mark.parametrize("master_weights", [True, False])
def test_what_trains_first_is_not_lost_with_its_file(master_weights: bool, folder: Path) -> None:
    """It was never frozen before, so that nothing has taken it out of the file."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options: dict[str, Any] = {"num_active": 1, "period": 1, "master_weights": master_weights}
    scheduler = LayerScheduler(model, optimizer, Given((1,), (2,)), frozen_weights="int8", **options)
    model(**make_batch()).loss.backward()
    optimizer.step()
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if ".layers.1." in n}
    scheduler.step()
    assert scheduler.frozen is not None and scheduler.frozen.host_bytes > 0
    assert not scheduler.frozen.mapped.intersection(trained)
    file = (folder / "model.safetensors").rename(folder / "away")
    kept = scheduler.trained_state_dict()
    assert all(torch.equal(kept[name], value) for name, value in trained.items())
    with pytest.raises(ConfigError, match="is there no more"):
        model.state_dict()
    file.rename(folder / "model.safetensors")
    scheduler.close()


def test_another_type_than_the_files_is_kept_in_memory(folder: Path) -> None:
    frozen = find_frozen_weights(load_frozen(folder, device="cpu", dtype=torch.float32))
    assert frozen is not None and not frozen.mapped and frozen.host_bytes > 0


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="could not be loaded: .*Choose another folder or hub id"):
        load_frozen(tmp_path)


def test_a_host_that_is_too_small_is_told_both_figures(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("layersample.frozen.exact.available_memory", lambda: 2**10)
    with pytest.raises(ConfigError, match=r"takes up to 0\.00 GiB .* but only 0\.00 GiB are available"):
        load_frozen(folder, device="cpu")


@pytest.mark.parametrize("loaded", [True, False])
def test_what_masters_hold_beyond_counts_and_nothing_has_happened(
    loaded: bool, folder: Path, monkeypatch: Any
) -> None:
    model: Any = load_frozen(folder, device="cpu") if loaded else make_llama(3, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.numel() >= 256)
    monkeypatch.setattr("layersample.frozen.exact.available_memory", lambda: 2 * layers - 1)
    with pytest.raises(ConfigError, match="master_weights=False, which halves it"):
        LayerScheduler(model, optimizer, "lisa", frozen_weights="nf4")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    LayerScheduler(model, optimizer, "lisa", frozen_weights="nf4", master_weights=False).close()


def test_metrics_see_exact_weights() -> None:
    model = make_llama(3)
    batches = [make_batch(seed) for seed in range(2)]

    def measure() -> list[Any]:
        return [
            metrics.layer_metrics(model, cache=False).matrices,
            metrics.outlier_ratios(model, batches, thresholds=(2.0,)),
            metrics.probe_lora(model, batches, steps=2),
        ]

    expected = measure()
    optimizer = torch.optim.AdamW(model.parameters())
    with LayerScheduler(model, optimizer, Given((1,)), frozen_weights="nf4") as scheduler:
        assert measure() == expected
        assert scheduler.frozen is not None and model(**make_batch()).loss.isfinite()
