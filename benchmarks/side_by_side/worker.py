"""The process of one run: ``python -m layersample_benchmarks.side_by_side.worker``, started by the runner alone.

It reads the suite and the job as JSON from standard input, and writes a line of JSON for each step, and at the
end for the result, to standard output. Everything else that is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from typing import Any


def main() -> None:
    """Do the run."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not get between the events
    # Line by line: the runner may end this process once it has the last event.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_runner, daemon=True).start()

    def send(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")

    try:
        result = _run(given, send)
    except Exception as error:
        import traceback

        traceback.print_exc()
        send({"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}"})
        sys.exit(1)
    send({"result": result})


def _run(given: dict[str, Any], send: Any) -> dict[str, Any]:
    import datasets
    import torch
    from transformers.utils import logging as transformers_logging

    from .suite import Job, Suite
    from .training import run_job

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(given["threads"])
    suite, job = Suite(**given["suite"]), Job(**given["job"])
    return run_job(
        suite, job, lambda step: send({"step": step["step"], "steps": job.steps, "loss": step["loss"]})
    )


def _end_with_the_runner() -> None:
    """Standard input ends when the runner does, killed or not; a run without it would only take its place."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
