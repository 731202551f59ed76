from __future__ import annotations

import pytest

from layersample import environment


@pytest.mark.parametrize(
    ("precision", "slowdown", "says"),
    [
        ("bf16", 8.0, "takes 8 times as long"),
        ("bf16-mixed", 3.0, "3 times"),
        ("bf16", 0.4, ""),
        ("fp32", 8.0, ""),
    ],
)
def test_slow_bf16_is_said_before_any_work(
    precision: str, slowdown: float, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "bf16_slowdown", lambda: slowdown)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    told = environment.slow_bf16_warning(precision)
    assert (says in told) if says else told == ""


def test_bf16_is_measured() -> None:
    assert environment.bf16_slowdown() > 0


@pytest.mark.parametrize(
    ("capability", "bf16", "told"),
    [("AVX2", False, "AVX2"), ("AVX512", True, "AVX512 with bf16"), ("DEFAULT", True, "DEFAULT")],
)
def test_generations_of_a_processor_are_told_apart(
    capability: str, bf16: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual machine's processor may have the same name in all of them."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr(environment, "has_bf16", lambda: bf16)
    assert environment.environment()["instructions"] == told
