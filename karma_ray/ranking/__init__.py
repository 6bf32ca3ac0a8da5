"""Click-through rates of candidates: exposures, features, models, and the training step."""
