from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from layersample import ConfigError, files
from layersample.files import check_output, check_output_file, replace_folder, write_json, write_text


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


@pytest.mark.parametrize("at_once", [True, False])
def test_replaces_a_folder(tmp_path: Path, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not at_once:  # as a system that can't swap folders
        monkeypatch.setattr(files, "_swap", lambda *folders: False)
    new, target = tmp_path / "new", tmp_path / "target"
    for folder, text in ((new, "new"), (target, "old")):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "a.txt").write_text(text)
    replace_folder(new, target)
    assert (target / "deep" / "a.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux swaps folders at once")
def test_a_folder_is_there_at_every_moment_while_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, target = tmp_path / "new", tmp_path / "target"
    for folder in (new, target):
        folder.mkdir()
        (folder / "name").write_text(folder.name)

    def killed(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    for module, name in ((os, "rename"), (shutil, "rmtree")):  # whatever comes next, the run ends there
        monkeypatch.setattr(module, name, killed)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(new, target)
    assert (target / "name").read_text() == "new"


def test_outputs_are_checked_before_any_work(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "deep")
    check_output(tmp_path)
    check_output_file(tmp_path / "x.png", "picture")
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("not-there")
    for path, message in (
        (tmp_path / ("x" * 256), "a name has at most 255 bytes"),
        (tmp_path / ("ä" * 128), "a name has at most 255 bytes"),
        (tmp_path / "loop", "circle|Too many levels"),
        (tmp_path / "loop" / "x", "circle|Too many levels"),
        (tmp_path / "nowhere", "a link to nowhere"),
        (tmp_path / "file" / "x", "file is a file"),
        (Path("a\0b"), "null"),
    ):
        with pytest.raises(ConfigError, match=f"The output folder must be writable, but for .*({message})"):
            check_output(path)
    with pytest.raises(ConfigError, match="picture must be a file, but .* is a folder"):
        check_output_file(tmp_path, "picture")
    with pytest.raises(ConfigError, match="picture must lie in a folder that exists"):
        check_output_file(tmp_path / "no" / "x.png", "picture")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop", "nowhere"]
