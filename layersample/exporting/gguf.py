"""GGUF files, by llama.cpp's own converter: which weights go where in one is its matter, and changes with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from layersample.errors import ConfigError
from layersample.files import check_output_file, whole_file

CONVERTER = "convert_hf_to_gguf.py"
_INSTALL = (
    f"git clone https://github.com/ggml-org/llama.cpp && pip install ./llama.cpp/gguf-py sentencepiece, then "
    f"give --converter llama.cpp/{CONVERTER}, or put its folder on PATH"
)
_MAGIC = b"GGUF"


def find_converter(given: Path | None) -> Path:
    """llama.cpp's script that converts models.

    Args:
        given: The script, or a folder of llama.cpp; ``None`` looks on PATH.

    Raises:
        ConfigError: If it isn't there; it says how to install it.
    """
    if given is not None:
        path = given / CONVERTER if given.is_dir() else given
        if not path.is_file():
            raise ConfigError(
                f"The converter must be llama.cpp's {CONVERTER}, but there is no file {path}: {_INSTALL}."
            )
        return path
    found = shutil.which(CONVERTER) or _on_path()
    if found is None:
        raise ConfigError(
            f"--gguf needs llama.cpp's {CONVERTER}, which isn't on PATH. Install it: {_INSTALL}."
        )
    return Path(found)


def convert(model: Path, output: Path, *, converter: Path, kind: str) -> None:
    """Have llama.cpp's converter write a GGUF file.

    Args:
        model: Folder of the model.
        output: The file; it appears once it is whole.
        converter: As :func:`find_converter` gives it.
        kind: Type of the weights, as the converter names it: ``auto``, ``f16``, ``q8_0``, …

    Raises:
        ConfigError: If the converter fails; its last line says why.
    """
    check_output_file(output, "GGUF file")
    if output.exists():
        raise ConfigError(
            f"The GGUF file must be new, but {output} is there already: choose another --output."
        )
    with whole_file(output) as scratch:
        try:
            ended = subprocess.run(
                [sys.executable, str(converter), str(model), "--outfile", str(scratch), "--outtype", kind],
                capture_output=True,
                text=True,
                errors="replace",
            )
            if ended.returncode or not _is_gguf(scratch):
                said = [line for line in (ended.stderr or ended.stdout).splitlines() if line.strip()]
                raise ConfigError(
                    f"{converter} must write a GGUF file, but it ended with code {ended.returncode}: "
                    f"{said[-1].strip() if said else 'it said nothing'}"
                )
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _on_path() -> str | None:
    """A script that isn't marked as a program is run by us all the same."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    return next((str(p) for f in folders if f and (p := Path(f) / CONVERTER).is_file()), None)
