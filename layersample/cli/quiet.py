"""A command's screen is for what the user asked: the libraries beneath keep quiet."""

from __future__ import annotations

import warnings
from contextlib import suppress


def quiet_libraries(*, reads_data: bool = False) -> None:
    """Turn off what transformers and datasets say of themselves, for the rest of the process.

    What they say to each other about their next versions is nothing that a user can act on, and their
    progress bars would break the command's own.

    Args:
        reads_data: Whether the command reads data too; only then is ``datasets`` imported.
    """
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if reads_data:
        with suppress(ImportError):  # what reads the data says by name what has to be installed
            import datasets

            datasets.disable_progress_bars()
