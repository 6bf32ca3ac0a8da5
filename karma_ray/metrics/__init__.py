"""Metrics as pure functions of arrays: ranking, semantics, collapse, significance."""
