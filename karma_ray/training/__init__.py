"""Training in plain PyTorch, without Ray."""
