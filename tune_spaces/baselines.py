"""The same search for every row of the baselines table: step size, and weight of hard negatives.

    python jobs/tune.py tune_spaces/baselines.py --trials 8
    python jobs/tune.py tune_spaces/baselines.py --trials 8 --set recipe=hstu --set model.kind=hstu

docs/baselines.md has the settings that make each row of the space's own.
"""

from ray import tune

SPACE = {
    "training.learning_rate": tune.loguniform(3e-4, 1e-2),
    "objective.hard_weight": tune.choice([0.5, 1.0, 2.0, 3.0]),
}
METRIC = "valid/HR@50"
BASE_RECIPE = "sasrec"
FIXED = ("training.validate_every=250",)
