"""The long torture: ``python -m tests.torture --kills 500 --schedules 1000 --damage 500 --ranks 100``.

It prints how many ended wrong, 0 if all is well, and ends with 1 otherwise. What is done is kept in ``--output``: the
same command goes on where it was stopped. ``--store`` writes the counts, with the commits and the machine.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # runs are forks of this process

import torch

from tests.torture.runner import KINDS, Torture


def main() -> int:
    """Torture as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture", description=(__doc__ or "").split("\n")[0]
    )
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, help=f"how many {kind}")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws")
    parser.add_argument(
        "--output", type=Path, default=Path("torture-results"), help="folder of what came of them"
    )
    parser.add_argument("--store", type=Path, help="file of the counts (JSON)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums differ in their last bits by the number of threads
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torture = Torture(arguments.output, arguments.seed)
    wrong = 0
    for kind in KINDS:
        count = getattr(arguments, kind)
        if count:
            found = torture.run(kind, count, lambda text: print(text, flush=True))
            print(f"{kind}: {count} done, {found} ended wrong", flush=True)
            wrong += found
    if torture.killed:
        print(f"processes killed: {torture.killed}")
    if arguments.store:
        torture.store(arguments.store)
    print(f"wrong ends: {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
