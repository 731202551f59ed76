from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from layersample import LayerScheduler
from tests.helpers import make_llama

NAME = "layersample.optim.step_hooks"


def clip(optimizer: Any, args: Any, kwargs: Any) -> None:
    """What a user's hook may do."""


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hook_that_has_no_effect_is_named_once(
    kind: str, early: bool, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_llama(dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    register = getattr(optimizer, f"register_step_{kind}_hook")
    with caplog.at_level(logging.WARNING, NAME):
        if early:
            register(clip)
        with LayerScheduler(model, optimizer, period=1) as scheduler:
            if not early:
                register(clip)
            scheduler.advance_to(3)
    lost = dtype == torch.bfloat16 and early == (kind == "post")
    said = [record.getMessage() for record in caplog.records if record.name == NAME]
    assert len(said) == lost
    if lost:
        assert said[0].startswith(f"{__name__}.clip, a {kind}-hook on the optimizer's step, comes")
