"""Weights of frozen layers in 8 or 4 bits on the device, and their exact values in the host's memory."""
