"""layersample: fine-tune large models a few layers at a time."""

import lazy_loader

__version__ = "0.1.0"  # pyproject.toml reads it from here

# The public names are those of __init__.pyi, each imported when it is first used: the Trainer and metrics take
# seconds that a plain torch loop need not spend, and the command line's help needs no torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
