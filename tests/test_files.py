from __future__ import annotations

import json
from pathlib import Path

import pytest

from layersample.files import replace_folder, write_json, write_text


def test_writes_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "a.txt", "new")
    write_json(tmp_path / "b.json", {"x": [1]})
    assert (tmp_path / "a.txt").read_text() == "new"
    assert json.loads((tmp_path / "b.json").read_text()) == {"x": [1]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "old")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert (tmp_path / "a.json").read_text() == "old"


def test_replaces_a_folder(tmp_path: Path) -> None:
    new, target = tmp_path / "new", tmp_path / "target"
    for folder, text in ((new, "new"), (target, "old")):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "a.txt").write_text(text)
    replace_folder(new, target)
    assert (target / "deep" / "a.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
