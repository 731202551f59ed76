"""The upload of a run's model to the Hugging Face hub, where its options ask for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from layersample.config import TrainConfig
from layersample.errors import ConfigError
from layersample.exporting.hub import Hub
from layersample.exporting.sources import MODEL
from layersample.training.ranks import Ranks


class Upload:
    """What is uploaded once a run has ended; whether it may be is asked before the run begins.

    Args:
        config: The options of the run.
        ranks: Its processes; the first one uploads.

    Raises:
        ConfigError: On all ranks, if the name can't be that of a repository, or nobody is logged in.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self._ranks = ranks
        repo = config.push_to_hub
        self._hub = ranks.together(
            lambda: Hub(repo, private=config.private) if repo is not None and ranks.first else None
        )

    def send(self, run: Path, report: Callable[[str], None]) -> None:
        """Upload the model of a run that has ended, if its options ask for it.

        Args:
            run: The folder of the run.
            report: Told where the model is.

        Raises:
            ConfigError: On all ranks, if the hub refuses it or can't be reached; it says how to upload it later.
        """
        place = self._ranks.together(lambda: self._send(run))
        if place is not None:
            report(f"Uploaded to {place}.")

    def _send(self, run: Path) -> str | None:
        if self._hub is None:
            return None
        try:
            return self._hub.upload(run / MODEL)
        except ConfigError as error:
            raise ConfigError(
                f"The run is done, and its model is in {run / MODEL}, but it isn't on the hub. {error} Then upload it "
                f"with: layersample export {run} --push-to-hub {self._hub.repo}"
            ) from error
