from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from layersample.metrics import MetricCache
from layersample.metrics.cache import hash_weight

KEY = ("a" * 64, "alpha", {"threshold": 1e-5})


def test_a_value_comes_back_exactly() -> None:
    MetricCache().store(*KEY, 0.1 + 0.2)
    assert MetricCache().load(*KEY) == 0.1 + 0.2


def test_another_weight_metric_or_parameter_is_another_value() -> None:
    MetricCache().store(*KEY, 1.5)
    assert MetricCache().load("b" * 64, *KEY[1:]) is None
    assert MetricCache().load(KEY[0], "hill", KEY[2]) is None
    assert MetricCache().load(KEY[0], "alpha", {"threshold": 1e-6}) is None


def test_the_folder(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MetricCache().folder == own_cache
    monkeypatch.delenv("LAYERSAMPLE_CACHE")
    assert MetricCache().folder.name == "metrics" and "layersample" in MetricCache().folder.parts


def test_no_temporary_file_stays(own_cache: Path) -> None:
    MetricCache().store(*KEY, 1.5)
    assert [path.suffix for path in own_cache.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"format": "layersample-metr',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'{"value": 2.0}',
        b"[" * 100_000,
    ],
)
def test_a_corrupt_or_foreign_file_warns_and_is_no_value(
    own_cache: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    MetricCache().store(*KEY, 1.5)
    [file] = own_cache.iterdir()
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert MetricCache().load(*KEY) is None
    assert "Measuring again" in caplog.text and str(file) in caplog.text


@pytest.mark.parametrize("value", ["2.0", None, True, float("nan"), float("inf")])
def test_a_value_that_is_no_finite_number_is_none(own_cache: Path, value: object) -> None:
    MetricCache().store(*KEY, 1.5)
    [file] = own_cache.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"value": value}))
    assert MetricCache().load(*KEY) is None


def test_another_entrys_file_is_foreign(own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    MetricCache().store(*KEY, 1.5)
    [first] = own_cache.iterdir()
    MetricCache().store("b" * 64, *KEY[1:], 2.5)
    [second] = set(own_cache.iterdir()) - {first}
    os.replace(second, first)
    assert MetricCache().load(*KEY) is None
    assert "Measuring again" in caplog.text


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = MetricCache(tmp_path / "file" / "below")
    cache.store(*KEY, 1.5)
    assert "aren't cached" in caplog.text
    assert cache.load(*KEY) is None


def test_values_that_are_not_finite_are_not_stored(own_cache: Path) -> None:
    MetricCache().store(*KEY, float("nan"))
    assert not own_cache.exists()


def test_the_hash_sees_content_shape_and_type_not_memory() -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    assert hash_weight(weight) == hash_weight(weight.T.contiguous().T)
    assert hash_weight(torch.stack([weight, weight])[1]) == hash_weight(weight)
    assert hash_weight(torch.nn.Parameter(weight)) == hash_weight(weight)
    others = [weight.reshape(4, 3), weight.double(), weight.bfloat16(), weight + 1e-6]
    assert len({hash_weight(other) for other in [weight, *others]}) == 5
