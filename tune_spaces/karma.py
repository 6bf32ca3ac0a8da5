"""KARMA on your data: the weights of texts and pictures, the action loss and the rate, at once.

    python jobs/tune.py tune_spaces/karma.py --data DATA --trials 20 --out OUT

Without visual features (`jobs/features.py DATA` makes them) the recipe is `karma_text`, and the
weight of the pictures is not drawn. The rates suit the small models that are trained from the
start; copy this file for an LLM, which takes about a tenth of them.
"""

from ray import tune

SPACE = {
    "objective.lambda_dec": tune.loguniform(0.01, 2.0),
    "objective.lambda_img": tune.loguniform(0.01, 1.0),
    "objective.action_loss": tune.choice(["pairwise", "infonce", "bce", "mse"]),
    "objective.hard_weight": tune.loguniform(0.1, 3.0),
    "training.learning_rate": tune.loguniform(3e-4, 1e-2),
}
METRIC = "valid/HR@50"
BASE_RECIPE = "karma_multimodal"
WITHOUT_IMAGES = "karma_text"
# Four chances to stop: after 1/8, 1/4 and 1/2 of the steps, and at the end.
FIXED = ("training.steps=400", "training.validate_every=50")
