"""The visual term: how much of it, told what, and by which head (equation 8).

python jobs/tune.py tune_spaces/imagery.py --trials 12
"""

from ray import tune

SPACE = {
    "objective.lambda_img": tune.loguniform(0.01, 1.0),
    "model.imagery.img_cond": tune.choice(["both", "task1", "task2"]),
    "model.imagery.img_head": tune.choice(["fm", "ddpm_eps", "ddpm_v", "ddpm_x0", "edm", "mse"]),
    "model.imagery.img_sees_text": tune.choice([False, True]),
    "model.imagery.img_connector": tune.choice([0, 1, 2]),
    "model.imagery.img_draws": tune.choice([1, 4]),
}
METRIC = "valid/HR@50"
BASE_RECIPE = "karma_multimodal"
FIXED = ("training.steps=1000", "training.validate_every=250")
