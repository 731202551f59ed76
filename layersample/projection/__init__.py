"""Low-rank projection of gradients."""
