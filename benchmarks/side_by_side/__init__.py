"""`layersample benchmark`: samplers and baselines side by side, measured and tested."""
