"""How the current query is read where it stands behind the history, its own words included.

python jobs/tune.py tune_spaces/queries.py --trials 8
"""

from ray import tune

SPACE = {
    "model.user_decoder.query_mode": tune.choice(["embed_pool", "tokens", "encoder", "none"]),
    "collate.drop_query": tune.uniform(0.0, 0.5),
}
METRIC = "valid/HR@50"
BASE_RECIPE = "toy"
FIXED = (
    "model.user_decoder.layout=query_last", "training.steps=150", "training.validate_every=30",
)  # fmt: skip
