"""What the library claims of a GPU, one measurement a file; ``layersample_benchmarks.gpu_check`` runs them all."""
