"""What tells the layers of a model apart, and how likely each sampler is to draw them."""
