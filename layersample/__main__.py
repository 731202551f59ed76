"""``python -m layersample``: the command line, also under ``torchrun -m`` and ``accelerate launch -m``."""

from layersample.cli.app import main

if __name__ == "__main__":
    main()
