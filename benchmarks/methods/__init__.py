"""The ways to fine-tune that the benchmark compares."""

from .method import Method, Prepared, register_baseline

__all__ = ["Method", "Prepared", "register_baseline"]
