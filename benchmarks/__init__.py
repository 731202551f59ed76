"""Measurements of layersample, each a command: ``python -m layersample_benchmarks.<name>``."""
