"""The scheduler, which switches layers, and all that a switch touches."""
