"""Uploads to the Hugging Face hub, and what can be wrong with them in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils._validators import validate_repo_id

from layersample.errors import ConfigError
from layersample.model_files import reason

_TOKEN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


class Hub:
    """A place on the hub to upload a folder to; whether the user may is asked before any work.

    Args:
        repo: Name of the repository: ``me/my-model``.
        private: Whether a new repository can be seen by its owner alone.

    Raises:
        ConfigError: If the name can't be one, or nobody is logged in.
    """

    def __init__(self, repo: str, *, private: bool = False) -> None:
        self.repo, self._private = repo, private
        self._api = HfApi()
        with self._explained():
            validate_repo_id(repo)
            self._api.whoami()

    def upload(self, folder: Path) -> str:
        """Upload a folder, into a repository that is made if it isn't there; where it can be seen.

        Args:
            folder: The folder.

        Raises:
            ConfigError: If the hub refuses it, or can't be reached.
        """
        with self._explained():
            self._api.create_repo(self.repo, private=self._private, exist_ok=True)
            self._api.upload_folder(
                repo_id=self.repo, folder_path=str(folder), commit_message="Upload by layersample"
            )
        return f"https://huggingface.co/{self.repo}"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except HFValidationError as error:
            raise ConfigError(
                f"--push-to-hub must name a repository, as me/my-model, but: {reason(error)}"
            ) from error
        except LocalTokenNotFoundError as error:
            raise ConfigError(f"To push to the hub you must be logged in: {_TOKEN}.") from error
        except OfflineModeIsEnabled as error:
            raise ConfigError("The hub can't be reached, because HF_HUB_OFFLINE is set: unset it.") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise ConfigError(
                    f"The hub refuses your token for {self.repo} ({status}): {_TOKEN} to it."
                ) from error
            raise ConfigError(f"The hub refuses {self.repo}: {reason(error)}") from error
        except Exception as error:  # of the network, as the hub's library of the day has them
            raise ConfigError(f"The hub can't be reached: {reason(error)}") from error
