"""Checkpoints: written in the background and verified when they are read."""
