"""PyTorch Lightning on two ranks: what they check (ranks_lightning) shows as a test each."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.parallel.ranks import checks_of, launch

if find_spec("lightning") is None:
    pytest.skip("needs lightning", allow_module_level=True)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], str]:
    return launch("ranks_lightning", tmp_path_factory.mktemp("ranks_lightning"))


@pytest.mark.parametrize("check", checks_of("ranks_lightning"))
def test_on_two_ranks(check: str, launched: tuple[set[str], str]) -> None:
    assert check in launched[0], launched[1]
