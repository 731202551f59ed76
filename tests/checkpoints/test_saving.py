from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from layersample import ConfigError
from layersample.checkpoints.saving import check_loadable, remove_unfinished, saving_folder


def test_only_what_a_dead_process_has_begun_is_removed(tmp_path: Path) -> None:
    own = saving_folder(tmp_path, 5)
    host = own.name.split("-")[2]
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        "dead": f".saving-5-{host}-{dead.pid}",
        "alive": f".saving-5-{host}-{os.getppid()}",
        "elsewhere": f".saving-5-x{host}-{dead.pid}",
    }
    for name in (*names.values(), own.name):
        (tmp_path / name).mkdir()
    remove_unfinished(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {names["alive"], names["elsewhere"]}
    remove_unfinished(tmp_path, alone=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", [{"a": numpy.arange(3)}, {"a": numpy.float64(1)}, {"path": Path("x")}])
def test_what_would_need_code_to_be_loaded_is_refused(tmp_path: Path, state: object) -> None:
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="the state of 'loader' holds other objects.*torch.from_numpy"):
        check_loadable(tmp_path / "a.pt", "the state of 'loader'")


def test_what_can_be_loaded_is_taken(tmp_path: Path) -> None:
    state = {
        "a": torch.randn(3, dtype=torch.bfloat16),
        1: [None, 2.5, "x", (True, b"y")],
        "n": torch.zeros(0),
    }
    torch.save(state, tmp_path / "a.pt")
    check_loadable(tmp_path / "a.pt", "it")
