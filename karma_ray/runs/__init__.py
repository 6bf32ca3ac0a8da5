"""A run from tables to a run folder, without Ray."""
