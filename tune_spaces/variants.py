"""Every open choice of the text model at once: a screening, after which few are worth a search.

    python jobs/tune.py tune_spaces/variants.py --trials 60

docs/switches.md says what each one is. `jobs/ablate.py switches` changes one at a time instead.
"""

from ray import tune

SPACE = {
    "model.user_decoder.layout": tune.choice(["interleaved", "items_only", "query_last"]),
    "model.user_decoder.query_mode": tune.choice(["embed_pool", "encoder", "none"]),
    "model.item_encoder.pool": tune.choice(["eos", "emb_token", "mean"]),
    "model.item_encoder.lexical": tune.choice([0, 16]),
    "model.score.kind": tune.choice(["rms_dot", "dot", "cos_learned"]),
    "model.score.scale": tune.loguniform(5.0, 64.0),
    "model.decodability.recon_cond": tune.choice(["eq7", "fig1"]),
    "model.decodability.recon_decoder": tune.choice(["shared", "separate", "light:1", "frozen"]),
    "model.decodability.recon_token_dropout": tune.uniform(0.0, 0.5),
    "model.decodability.share_projector": tune.choice([True, False]),
    "model.decodability.task1_see_readout": tune.choice([True, False]),
    "model.peft": tune.choice(["full", "lora:8"]),
    "objective.act_positions": tune.choice(["all", "last"]),
    "objective.action_loss": tune.choice(["pairwise", "infonce", "bce", "mse"]),
    "objective.act_reduction": tune.choice(["mean_by_type", "paper_sum"]),
    "objective.ce_reduction": tune.choice(["token_mean", "sum"]),
    "objective.hard_weight": tune.uniform(0.0, 3.0),
    "objective.batch_weight": tune.uniform(0.1, 3.0),
    "objective.lambda_dec": tune.loguniform(0.01, 2.0),
    "objective.generation": tune.uniform(0.0, 1.0),
    "objective.reconstruction": tune.uniform(0.0, 1.0),
    "collate.num_decoded": tune.choice([2, 1, 0]),
    "training.encoder_grad": tune.choice(["full", "targets_only", "head", "frozen"]),
    "warmup.train": tune.choice(["decoder", "adapters_only", "all"]),
    "warmup.skip": tune.choice([False, True]),
}
METRIC = "valid/HR@50"
BASE_RECIPE = "toy"
FIXED = ("training.steps=150", "training.validate_every=30")
