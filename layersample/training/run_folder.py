"""The output folder of a run: chosen, checked, resumed or replaced, and never lost to a run that fails."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from layersample.checkpoints.whole import check, find_last, remove_unfinished
from layersample.config import TrainConfig, check_same_run
from layersample.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Where a run is written.

    Args:
        path: The folder.
        resume: Whether to continue the run in it.
        overwrite: Whether to replace the run in it.
    """

    path: Path
    resume: bool
    overwrite: bool

    @classmethod
    def choose(cls, config: TrainConfig) -> RunFolder:
        """The folder that a configuration names, or a new one under ``runs/``.

        Raises:
            ConfigError: If it holds something and neither resume nor overwrite is on, there is nothing to
                resume, or it can't be written. Nothing is changed.
        """
        path = config.output or Path("runs") / f"{config.sampler}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = cls(path, config.resume, config.overwrite)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"The output must be a folder, but {path} is a file.")
        holds_something = path.is_dir() and any(path.iterdir())
        if holds_something and not (config.resume or config.overwrite):
            raise ConfigError(
                f"The output folder must be new or empty, but {path} holds {_contents(path)}. "
                "Add --resume to continue that run, --overwrite to replace it, or choose another --output."
            )
        if config.resume:
            last = find_last(folder.checkpoints)
            if last is None:
                raise ConfigError(
                    f"There must be a checkpoint to resume from, but {folder.checkpoints} has none. Runs save "
                    "them every --save-steps steps and on Ctrl-C. Leave --resume out to begin anew."
                )
            check(last)
            check_same_run(config, path / "config.yaml")
        if config.overwrite and holds_something and not (path / "config.yaml").is_file():
            raise ConfigError(
                f"--overwrite replaces a run, but {path} holds {_contents(path)} and no config.yaml."
            )
        folder._check_writable()
        return folder

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @contextmanager
    def open(self) -> Iterator[Path | None]:
        """Make the folder ready, and give the checkpoint to resume from.

        A run that is replaced is set aside first, and removed only once the new one has ended well. A new run
        that fails before it has measured anything leaves nothing behind.
        """
        aside: Path | None = None
        if self.overwrite and self.path.exists():
            aside = next(p for n in range(1, 10**6) if not (p := self._aside(n)).exists())
            self.path.rename(aside)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.checkpoints)
        try:
            yield find_last(self.checkpoints) if self.resume else None
        except BaseException:
            metrics = self.path / "metrics.jsonl"
            if not self.resume and not (metrics.exists() and metrics.stat().st_size):
                shutil.rmtree(self.path)  # it was new or empty
                if aside is not None:
                    aside.rename(self.path)
            elif aside is not None:
                logger.warning(
                    "The run in %s didn't end well; the one it was to replace is in %s.", self.path, aside
                )
            raise
        if aside is not None:
            shutil.rmtree(aside)

    def _aside(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.previous" + (f"-{number}" if number > 1 else ""))

    def _check_writable(self) -> None:
        parent = self.path
        while not parent.exists():
            parent = parent.parent
        probe = parent / f".layersample-{datetime.now():%f}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            raise ConfigError(f"The output folder must be writable, but {parent} isn't: {error}.") from error


def _contents(path: Path, limit: int = 3) -> str:
    names = sorted(p.name for p in path.iterdir())
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
