"""Errors of a sampler's own code: whose they are, and where."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch

from layersample.errors import ConfigError


class SamplerError(ConfigError):
    """A sampler's own code raised, or returned what it must not; the cause has the traceback of its code alone."""


@contextmanager
def naming(sampler: object, name: str, period: int) -> Iterator[None]:
    """Say of an error in the block which sampler it comes from.

    Running out of memory stays what it is, since callers look for it to try again with less.

    Args:
        sampler: The sampler that runs in the block.
        name: What the user calls it.
        period: The period it is asked about.

    Raises:
        ConfigError: In place of one without the name.
        SamplerError: In place of whatever else its code raises, an end of the whole program (``sys.exit``) too.
    """
    try:
        yield
    except ConfigError as error:
        raise type(error)(f"Sampler {name}, period {period}: {error}") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        error.add_note(f"raised by the sampler {name} in period {period}")
        raise
    except (Exception, SystemExit) as error:
        file = _file_of(sampler)
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in frames if frame.filename == file] or frames[-1:]
        place = f"{inside[-1].filename}, line {inside[-1].lineno}, in {inside[-1].name}"
        raise SamplerError(
            f"Sampler {name}, period {period}: {place}, raised {type(error).__name__}: {error}"
        ) from error.with_traceback(_from_file(error, file))


def _file_of(sampler: object) -> str | None:
    try:
        return inspect.getfile(type(sampler))
    except (TypeError, OSError):  # made in a console
        return None


def _from_file(error: BaseException, file: str | None) -> TracebackType | None:
    """The traceback from the first frame in a file on; all of it if there is none."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != file:
        trace = trace.tb_next
    return trace or error.__traceback__
