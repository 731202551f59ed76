"""What a delta says of itself, in the header of its safetensors file: its base, and how the model is put together."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from layersample.errors import ConfigError
from layersample.exporting.saved_tensors import check_inside

KEY = "layersample_delta"
DELTA_FILE = "delta.safetensors"


class WeightFile(BaseModel):
    """A file of the model's weights.

    Args:
        metadata: What the file says of itself.
        dtypes: The type of each weight in it, by name; the base may hold the same in another one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    metadata: dict[str, str]
    dtypes: dict[str, str]


class OtherFile(BaseModel):
    """Any other file of the model.

    Args:
        source: Whether it lies beside the base's weights, or beside the delta.
        sha256: Of its bytes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: Literal["base", "delta"]
    sha256: str


class Manifest(BaseModel):
    """All that ``layersample apply`` needs to know beside the weights themselves.

    Args:
        version: Of this format.
        base: The base's name, as the run had it; of a local one the folder's name alone.
        base_sha256: Hash of the base's content.
        model_sha256: The same of the model that comes out.
        weights: The files of the model's weights, by name.
        files: Its other files, by their path in the folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = 1
    base: str
    base_sha256: str
    model_sha256: str
    weights: dict[str, WeightFile]
    files: dict[str, OtherFile]

    @classmethod
    def read(cls, metadata: dict[str, str] | None, path: Path) -> Manifest:
        """Take it from the header of a file.

        Raises:
            ConfigError: If it isn't there, is of another version, or names files outside of the folder.
        """
        if not metadata or KEY not in metadata:
            raise ConfigError(
                f"{path}: must be a delta of layersample export --delta, but it doesn't say so."
            )
        try:
            manifest = cls.model_validate_json(metadata[KEY])
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(map(str, fault["loc"]))
            raise ConfigError(
                f"{path}: its header can't be used, because of {place or 'its text'}: {fault['msg']}. It may be from "
                "a newer layersample."
            ) from error
        for name in (*manifest.weights, *manifest.files):
            check_inside(name, path)
        for file in manifest.weights.values():
            for name in file.dtypes.values():
                if not isinstance(getattr(torch, name, None), torch.dtype):
                    raise ConfigError(f"{path}: weights must have a type of torch's, but it names {name!r}.")
        return manifest
