"""What any strategy says of itself."""

from __future__ import annotations

import inspect

from layersample.registry import describe, describe_options


def check_documented(strategy: object) -> None:
    """Check that a docstring has a first line and says what each option means, and that options are keyword-only.

    Args:
        strategy: A sampler or a projection.

    Raises:
        AssertionError: If not.
    """
    cls = type(strategy)
    assert describe(cls)[0], f"{cls.__name__} has no docstring"
    assert [option.name for option in describe_options(cls) if not option.description] == []
    for parameter in inspect.signature(cls).parameters.values():
        assert parameter.kind is parameter.KEYWORD_ONLY, f"option {parameter.name} must be keyword-only"
