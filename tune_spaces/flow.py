"""Where flow matching spends its times, in the visual head and in the generator.

python jobs/tune.py tune_spaces/flow.py --trials 12
"""

from ray import tune

SPACE = {
    "model.imagery.denoiser.times": tune.choice(["uniform", "logit_normal"]),
    "model.imagery.denoiser.shift": tune.choice([0.0, 1.0, 3.0]),
    "model.generator.denoiser.times": tune.choice(["uniform", "logit_normal"]),
    "model.generator.denoiser.shift": tune.choice([0.0, 3.0]),
}
METRIC = "valid/HR@50"
BASE_RECIPE = "karma_multimodal"
FIXED = ("model.generator.kind=fm", "training.steps=1000", "training.validate_every=250")
