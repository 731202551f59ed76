"""Samplers and baselines side by side (``layersample benchmark``), and measurements of layersample itself.

Each measurement is a command: ``python -m layersample_benchmarks.<name>``.
"""
