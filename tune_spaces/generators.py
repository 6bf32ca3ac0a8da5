"""Which generator of the retrieval embedding, beside L_act or in its place, and how it is sampled.

python jobs/tune.py tune_spaces/generators.py --trials 12
"""

from ray import tune

SPACE = {
    # Not ddpm_eps: it has no estimate in one step, which recon_src=x0 decodes.
    "model.generator.kind": tune.choice(["mse", "ddpm_v", "ddpm_x0", "edm", "fm"]),
    "model.generator.steps": tune.choice([1, 4, 0]),
    "model.generator.samples": tune.choice([1, 4, 16]),
    "model.generator.agg": tune.choice(["mean", "union"]),  # of one sample: itself
    "model.generator.recon_src": tune.choice(["condition", "x0"]),
    "objective.gen_mode": tune.choice(["add", "replace"]),
    "objective.gen_weight": tune.loguniform(0.1, 3.0),
}
METRIC = "valid/HR@50"
BASE_RECIPE = "ar_fm"
FIXED = (
    "model.generator.agg=mean", "training.steps=1000", "training.validate_every=250",
)  # fmt: skip
