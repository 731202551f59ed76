"""Checkpoints that are whole or not there, of one process and of many."""
