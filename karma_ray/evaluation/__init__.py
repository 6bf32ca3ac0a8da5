"""What a finished or running model is worth, and what has become of it."""
