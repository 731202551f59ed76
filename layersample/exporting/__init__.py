"""What comes out of a run: deltas against the base, model cards, GGUF files, uploads to the hub."""
