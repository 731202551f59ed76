"""The output folder of a run: chosen, checked, resumed or replaced, and never lost to a run that fails."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from layersample.checkpoints.layout import check_layout, layout_of
from layersample.checkpoints.saving import remove_unfinished
from layersample.checkpoints.seal import check, check_resumable, find_last
from layersample.config import TrainConfig
from layersample.errors import ConfigError
from layersample.files import LOCK, check_output, only_one
from layersample.training.resuming import RANKS, check_same_run

CHECKPOINTS = "checkpoints"  # the folder of them, in that of a run

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
    def choose(cls, config: TrainConfig, apart_from: Collection[str] = ()) -> RunFolder:
        """The folder that a configuration names, or a new one under ``runs/``.

        Args:
            config: The options.
            apart_from: Options in which a resumed run may differ from how it was begun.

        Raises:
            ConfigError: If it holds something and neither resume nor overwrite is on, there is nothing to
                resume, another run is at work in it, or it can't be written. Nothing is changed.
        """
        path = config.output or _new_name(config.sampler)
        folder = cls(path, config.resume, config.overwrite)
        check_output(path)
        here = Path.cwd()
        if config.overwrite and path.resolve() in (here, *here.parents):
            raise ConfigError(
                f"--overwrite must replace a folder beside the work, but {str(path)!r} is the current folder or one "
                "above it. Change to another folder first."
            )
        if path.exists() and not path.is_dir():
            raise ConfigError(f"The output must be a folder, but {path} is a file.")
        if (path / LOCK).is_file():  # or this would make one
            with only_one(path):
                pass
        folder._check_free()
        if config.resume:
            last = find_last(folder.checkpoints)
            if last is None:
                raise ConfigError(
                    f"There must be a checkpoint to resume from, but {folder.checkpoints} has none. Runs save "
                    "them every --save-steps steps and on Ctrl-C. Leave --resume out to start a new run."
                )
            check(last, verify=config.verify, allow_changes=config.allow_changes)
            check_resumable(last)
            check_layout(
                last, layout_of(shards=config.shard is not None, in_parts=config.sharded_checkpoints)
            )
            check_same_run(config, path / "config.yaml", apart_from)
        return folder

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    @contextmanager
    def open(self) -> Iterator[Path | None]:
        """Take the folder for this run alone, make it ready, and give the checkpoint to resume from.

        A run that is replaced is set aside first, and removed only once the new one has ended well. A new run
        that fails before it has measured anything leaves nothing of its own behind.

        Raises:
            ConfigError: If another run is at work in it, or came first.
        """
        made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        with only_one(self.path):
            self._check_free()  # once more: another run may have come and gone since it was chosen
            aside = self._set_aside()
            # The lock that is held has moved away with the run that is to be replaced.
            with only_one(self.path) if aside else nullcontext():
                yield from self._run(made or aside is not None, aside)

    def _run(self, made: bool, aside: Path | None) -> Iterator[Path | None]:
        self.checkpoints.mkdir(exist_ok=True)
        remove_unfinished(self.checkpoints, alone=True)
        try:
            yield find_last(self.checkpoints) if self.resume else None
        except BaseException:
            metrics = self.path / "metrics.jsonl"
            if self.resume or (metrics.exists() and metrics.stat().st_size):
                if aside is not None:
                    logger.warning(
                        "The run in %s didn't end well; the one it was to replace is in %s.", self.path, aside
                    )
            else:
                self._remove_own(made)
                if aside is not None:
                    aside.rename(self.path)
            raise
        if aside is not None:
            shutil.rmtree(aside)

    def _set_aside(self) -> Path | None:
        if not (self.overwrite and _names(self.path)):
            return None
        aside = next(p for n in range(1, 10**6) if not (p := self._aside(n)).exists())
        self.path.rename(aside)
        self.path.mkdir()
        return aside

    def _remove_own(self, made: bool) -> None:
        """Remove what this run has made so far; whatever else is in the folder stays, and so does the folder then."""
        for name in ("config.yaml", "metrics.jsonl", RANKS, LOCK):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        if made:
            with suppress(OSError):  # it isn't empty
                self.path.rmdir()

    def _check_free(self) -> None:
        """Make sure that the run may have the folder as it is."""
        held = _names(self.path)
        if held and not (self.resume or self.overwrite):
            raise ConfigError(
                f"The output folder must be new or empty, but {self.path} holds {_some(held)}. "
                "Add --resume to continue that run, --overwrite to replace it, or choose another --output."
            )
        if self.overwrite and held and "config.yaml" not in held:
            raise ConfigError(
                f"--overwrite replaces a run, but {self.path} holds {_some(held)} and no config.yaml."
            )

    def _aside(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.previous" + (f"-{number}" if number > 1 else ""))


def _new_name(sampler: str) -> Path:
    """A folder that no other run has, though it begins in the same second."""
    while True:
        path = Path("runs") / f"{sampler}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        if not path.exists():
            return path


def _names(path: Path) -> list[str]:
    """What is in a folder, but for what a run leaves that was killed before it wrote anything."""
    if not path.is_dir():
        return []
    entries = (p for p in path.iterdir() if p.name != LOCK)
    return sorted(p.name for p in entries if p.name != CHECKPOINTS or not p.is_dir() or any(p.iterdir()))


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
