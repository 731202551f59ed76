"""Deltas: what a run changed of its base, and the way back to the whole model, to the bit."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from layersample.errors import ConfigError
from layersample.exporting.cards import CARD, delta_card
from layersample.exporting.manifest import DELTA_FILE, KEY, Manifest, OtherFile, WeightFile
from layersample.exporting.saved_tensors import (
    SavedTensors,
    as_bytes,
    content_hash,
    digest,
    dtype_name,
    open_file,
)
from layersample.files import check_output, replace_folder, write_text

OTHER_FILES = "files"
"""Folder, in a delta, of what the model holds beside its weights and the base doesn't: a README of it, say."""


@dataclass(frozen=True)
class DeltaSize:
    """How large a delta is beside its model.

    Args:
        changed: Weights in the delta.
        weights: Weights of the model.
        changed_bytes: Bytes of the former.
        total_bytes: Bytes of the latter.
    """

    changed: int
    weights: int
    changed_bytes: int
    total_bytes: int

    @property
    def sentence(self) -> str:
        """It in words."""
        return (
            f"{self.changed} of {self.weights} weights differ from the base: {self.changed_bytes / 2**20:,.1f} of "
            f"{self.total_bytes / 2**20:,.1f} MiB."
        )


def export_delta(base: Path, model: Path, output: Path, *, name: str) -> DeltaSize:
    """Write what a model has that its base hasn't.

    The two are compared bit by bit; a weight that the base holds in another type counts as the base's where the
    base's, cast, is the same. So nothing has to be known of the run.

    Args:
        base: Folder of the base.
        model: Folder of the trained model.
        output: Folder to write: new or empty.
        name: The base's name, which the delta keeps.

    Raises:
        ConfigError: If a folder can't be used, or nothing differs. Nothing is then left behind.
    """
    check_free(output)
    ours, theirs = SavedTensors(model), SavedTensors(base)
    changed: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    total = 0
    for weight in ours:
        tensor = ours[weight]
        digests[weight], total = digest(tensor), total + tensor.nbytes
        if weight not in theirs or not _same(tensor, theirs[weight]):
            changed[weight] = tensor
    if not changed:
        raise ConfigError(
            f"A trained model must differ from its base, but {model} and {base} are the same to the bit."
        )
    manifest = Manifest(
        base=name,
        base_sha256=content_hash({weight: digest(theirs[weight]) for weight in theirs}),
        model_sha256=content_hash(digests),
        weights={
            file: WeightFile(
                metadata=ours.metadata(file),
                dtypes={weight: dtype_name(ours[weight].dtype) for weight in weights},
            )
            for file, weights in ours.files.items()
        },
        files=_other_files(model, base, leave_out=ours.files),
    )
    size = DeltaSize(len(changed), len(digests), sum(tensor.nbytes for tensor in changed.values()), total)
    with _folder_beside(output) as scratch:
        # One key: safetensors writes several in any order, and equal deltas shall be equal files.
        save_file(changed, scratch / DELTA_FILE, metadata={KEY: manifest.model_dump_json()})
        for path, file in manifest.files.items():
            if file.source == "delta":
                _copy(model / path, scratch / OTHER_FILES / path)
        card = model / CARD
        run = card.read_text(encoding="utf-8") if card.is_file() else ""
        write_text(scratch / CARD, delta_card(manifest, size.sentence, run))
    return size


def apply_delta(base: Path, delta: Path, output: Path) -> Manifest:
    """Put a model together from its base and a delta, to the bit.

    Args:
        base: Folder of the base.
        delta: Folder of the delta.
        output: Folder to write: new or empty.

    Returns:
        What the delta says of itself.

    Raises:
        ConfigError: If the base is another one, or a file is damaged. Nothing is then left behind.
    """
    check_free(output)
    path = delta / DELTA_FILE
    file = open_file(path)
    manifest = Manifest.read(file.metadata(), path)
    theirs = SavedTensors(base)
    found = content_hash({weight: digest(theirs[weight]) for weight in theirs})
    if found != manifest.base_sha256:
        raise ConfigError(
            f"A delta must be applied to the base that it was made from, {manifest.base} with the hash "
            f"{manifest.base_sha256[:12]}…, but {base} has the hash {found[:12]}…: choose that base."
        )
    changed = set(file.keys())
    digests: dict[str, str] = {}
    with _folder_beside(output) as scratch:
        for name, weights in manifest.weights.items():
            tensors: dict[str, Tensor] = {}
            for weight, dtype in weights.dtypes.items():
                if weight not in changed and weight not in theirs:
                    raise ConfigError(_damaged(path, f"it lacks the weight {weight!r}"))
                tensor = (
                    file.get_tensor(weight) if weight in changed else theirs[weight].to(getattr(torch, dtype))
                )
                tensors[weight], digests[weight] = tensor, digest(tensor)
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, scratch / name, metadata=weights.metadata or None)
        if content_hash(digests) != manifest.model_sha256:
            raise ConfigError(
                _damaged(path, "the model that comes out has another hash than was written down")
            )
        for name, other in manifest.files.items():
            source = (base if other.source == "base" else delta / OTHER_FILES) / name
            if not source.is_file() or _hash_file(source) != other.sha256:
                raise ConfigError(_damaged(source, "it isn't the file that the delta was made with"))
            _copy(source, scratch / name)
    return manifest


def check_free(output: Path) -> None:
    """Make sure that a folder can be written and holds nothing yet.

    Raises:
        ConfigError: If not.
    """
    check_output(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"The output folder must be new or empty, but {output} isn't: choose another --output."
        )


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(as_bytes(ours), as_bytes(theirs.to(ours.dtype)))


def _other_files(model: Path, base: Path, *, leave_out: dict[str, list[str]]) -> dict[str, OtherFile]:
    found = {}
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        name = path.relative_to(model).as_posix()
        if name in leave_out or any(part.startswith(".") for part in name.split("/")):
            continue
        own, twin = _hash_file(path), base / name
        there = twin.is_file() and _hash_file(twin) == own
        found[name] = OtherFile(source="base" if there else "delta", sha256=own)
    return found


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


@contextmanager
def _folder_beside(output: Path) -> Iterator[Path]:
    """A folder to write into, which takes the output's place once all is in it."""
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.absolute().parent) as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        yield whole
        replace_folder(whole, output)


def _damaged(path: Path, why: str) -> str:
    return f"{path}: can't be used, because {why}. Make the delta anew with layersample export --delta."
