"""Metrics as pure functions of arrays: ranking, semantic overlap, collapse, significance."""
