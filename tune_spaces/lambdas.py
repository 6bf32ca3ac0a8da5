"""How much text, and which action loss: the two knobs of equations 4, 5 and 9.

    python jobs/tune.py tune_spaces/lambdas.py --trials 3

A space names what is drawn (`SPACE`: dotted configuration paths -> Ray Tune domains), what is
maximised (`METRIC`, on validation examples) and what is held fixed (`BASE_RECIPE`, `FIXED`).
"""

from ray import tune

SPACE = {
    "objective.lambda_dec": tune.loguniform(0.01, 2.0),
    "objective.action_loss": tune.choice(["pairwise", "infonce", "bce", "mse"]),
}
METRIC = "valid/HR@50"
BASE_RECIPE = "toy"
# Enough steps to tell settings apart, and a validation often enough to stop the weak ones early.
FIXED = ("training.steps=150", "training.validate_every=30")
