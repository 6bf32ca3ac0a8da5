"""Plain PyTorch training and evaluation; knows nothing of Ray."""
