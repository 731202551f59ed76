from __future__ import annotations

import pytest
import torch

from layersample_benchmarks.side_by_side import worker


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_is_a_fork_unless_cuda_has_begun(begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: begun)
    assert worker._may_fork() is not begun
