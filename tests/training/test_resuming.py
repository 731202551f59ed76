from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layersample.config import make_config, write_yaml
from layersample.errors import ConfigError
from layersample.training.resuming import keep_steps, note_ranks, ranks_of


def resumed(folder: Path, ranks: int, *, now: int, **options: Any) -> tuple[int, int]:
    """What a run of some ranks, batches of 4 and an accumulation of 3 has on another number of them."""
    own = {"batch_size": 4, "gradient_accumulation": 3, "output": folder}
    (folder / "config.yaml").write_text(write_yaml(make_config(("test", own))))
    note_ranks(folder, ranks)
    assert ranks_of(folder) == ranks
    return keep_steps(make_config(("test", {**own, "resume": True, **options})), now)


@pytest.mark.parametrize(
    ("ranks", "now", "size", "accumulation"),
    [(2, 2, 4, 3), (2, 1, 4, 6), (1, 2, 3, 2), (1, 3, 4, 1), (1, 4, 3, 1), (1, 12, 1, 1), (4, 3, 4, 4)],
)
def test_a_step_keeps_its_examples(
    ranks: int, now: int, size: int, accumulation: int, tmp_path: Path
) -> None:
    assert resumed(tmp_path, ranks, now=now) == (size, accumulation)
    assert size * accumulation * now == 12 * ranks


def test_numbers_of_one_s_own_are_kept_where_they_fit(tmp_path: Path) -> None:
    given = {"batch_size": 2, "gradient_accumulation": 12}
    assert resumed(tmp_path, 2, now=1, **given) == (2, 12)
    assert resumed(tmp_path, 2, now=1, batch_size=1, allow_changes=True) == (1, 3)
    with pytest.raises(
        ConfigError, match=r"has 24 examples \(2 ranks × batch_size 4 .* would have 3 \(1 rank ×"
    ):
        resumed(tmp_path, 2, now=1, batch_size=1)
    with pytest.raises(ConfigError, match="has 12 examples .* another number of ranks"):
        resumed(tmp_path, 1, now=5)
