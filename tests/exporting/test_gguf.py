"""GGUF by llama.cpp's converter; here by a script with its arguments (convert_hf_to_gguf.py, parse_args)."""

from __future__ import annotations

from pathlib import Path

import pytest

from layersample import ConfigError
from layersample.exporting.gguf import CONVERTER, convert, find_converter

SCRIPT = """
import argparse, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "auto"], default="auto")
parser.add_argument("model", type=str, nargs="?")
args = parser.parse_args()
print("INFO:hf-to-gguf:Loading model", file=sys.stderr)
if not pathlib.Path(args.model, "config.json").is_file():
    sys.exit("Error: no config.json")
args.outfile.write_bytes(b"GGUF" + args.outtype.encode())
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    path = folder / CONVERTER
    path.write_text(SCRIPT)
    return path


def test_is_found_where_it_is_given_or_on_path(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_converter(script) == find_converter(script.parent) == script
    monkeypatch.setenv("PATH", str(script.parent))
    assert find_converter(None) == script
    monkeypatch.setenv("PATH", str(script.parent.parent))
    with pytest.raises(ConfigError, match="isn't on PATH. Install it: git clone .*llama.cpp"):
        find_converter(None)
    with pytest.raises(ConfigError, match="there is no file .*nowhere"):
        find_converter(script.parent / "nowhere")


def test_writes_the_file_whole(script: Path, tiny_model: Path, tmp_path: Path) -> None:
    convert(tiny_model, tmp_path / "out.gguf", converter=script, kind="q8_0")
    assert (tmp_path / "out.gguf").read_bytes() == b"GGUFq8_0"
    with pytest.raises(ConfigError, match="must be new"):
        convert(tiny_model, tmp_path / "out.gguf", converter=script, kind="q8_0")


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("q9", "", "ended with code 2: .*invalid choice: 'q9'"),
        ("f16", "nothing", "ended with code 1: Error: no config.json"),
    ],
)
def test_says_why_it_failed(
    script: Path, tiny_model: Path, tmp_path: Path, kind: str, model: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(tiny_model / model, tmp_path / "out.gguf", converter=script, kind=kind)
    assert {p.name for p in tmp_path.iterdir()} == {"llama.cpp"}


def test_what_it_writes_must_be_gguf(script: Path, tiny_model: Path, tmp_path: Path) -> None:
    script.write_text(SCRIPT.replace('b"GGUF"', 'b"no"'))
    with pytest.raises(ConfigError, match="must write a GGUF file, but it ended with code 0"):
        convert(tiny_model, tmp_path / "out.gguf", converter=script, kind="f16")
