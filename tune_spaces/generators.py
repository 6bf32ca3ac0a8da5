"""Which generator of the retrieval embedding, beside L_act or in its place, and how it is sampled.

python jobs/tune.py tune_spaces/generators.py --trials 12
"""

from ray import tune

SPACE = {
    "model.generator.kind": tune.choice(["mse", "ddpm_eps", "ddpm_v", "edm", "fm"]),
    "model.generator.steps": tune.choice([1, 4, 0]),
    "objective.gen_mode": tune.choice(["add", "replace"]),
    "objective.gen_weight": tune.loguniform(0.1, 3.0),
}
METRIC = "valid/HR@50"
BASE_RECIPE = "ar_fm"
FIXED = ("training.steps=1000", "training.validate_every=250")
