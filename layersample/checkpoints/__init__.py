"""Checkpoints of one process and of many; an unfinished one is never read."""
