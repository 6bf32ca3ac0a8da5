"""KARMA on Ray: knowledge-action regularized alignment for personalized search."""

__version__ = "0.1.0"
