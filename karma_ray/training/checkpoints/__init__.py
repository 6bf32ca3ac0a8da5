"""Checkpoints: written in the background, checked when read, found again."""
