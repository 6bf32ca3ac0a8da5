"""Evaluation of finished and running models: metrics, checks, cases, diagnosis and alarm."""
