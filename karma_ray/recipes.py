"""Recipes, the named runs: one function per row of the paper's tables, and floors and ceilings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from karma_ray.config import Config
from karma_ray.errors import InputError
from karma_ray.model.config import TinyBackboneConfig
from karma_ray.ranking.config import CTR


def _with_objective(name: str, generation: float, reconstruction: float) -> Config:
    base = Config(recipe=name)
    objective = replace(base.objective, generation=generation, reconstruction=reconstruction)
    return replace(base, objective=objective)


def action_only() -> Config:
    """L_act alone, Table 1's baseline, from the same pretrained and warmed-up weights."""
    return _with_objective("action_only", 0.0, 0.0)


def history_to_text() -> Config:
    """L_act and Task 1: the target's text from the history (equation 6)."""
    return _with_objective("history_to_text", 1.0, 0.0)


def embedding_to_text() -> Config:
    """L_act and Task 2: the target's text from h_t alone (equation 7)."""
    return _with_objective("embedding_to_text", 0.0, 1.0)


def karma_text() -> Config:
    """L_act, Task 1 and Task 2: text-only KARMA."""
    return _with_objective("karma_text", 1.0, 1.0)


def karma_multimodal() -> Config:
    """`karma_text` and the visual term; needs the features of `jobs/features.py`."""
    base = _with_objective("karma_multimodal", 1.0, 1.0)
    return replace(base, objective=replace(base.objective, lambda_img=0.3))


def action_only_unwarmed() -> Config:
    """Control: `action_only` without the warm-up, with which all other rows start."""
    base = _with_objective("action_only_unwarmed", 0.0, 0.0)
    return replace(base, warmup=replace(base.warmup, skip=True))


def null_detached() -> Config:
    """Null control: Task 2 has no gradient to h_t, but trains the decoder that tasks share."""
    return _with_null("null_detached", recon_detach_h=True)


def null_detached_separate() -> Config:
    """Null control: Task 2 has a separate decoder and projector, and trains no serving module."""
    return _with_null(
        "null_detached_separate", recon_detach_h=True, recon_decoder="separate",
        share_projector=False,
    )  # fmt: skip


def null_shuffled() -> Config:
    """Null control: Task 2 decodes other items' texts, the same computation without meaning."""
    return _with_null("null_shuffled", recon_text="shuffled")


def null_both_shuffled() -> Config:
    """Null control of `karma_text`: Task 1 unchanged, Task 2 with other items' texts."""
    return _with_null("null_both_shuffled", generation=1.0, recon_text="shuffled")


def _with_null(name: str, generation: float = 0.0, **changes: Any) -> Config:
    base = _with_objective(name, generation, 1.0)
    decodability = replace(base.model.decodability, **changes)
    return replace(base, model=replace(base.model, decodability=decodability))


def ar_mse() -> Config:
    """`karma_text` that searches with a regression onto the clicked item's embedding (Table 2)."""
    return _with_generator("ar_mse", kind="mse")


def ar_ddpm() -> Config:
    """`karma_text` that searches by a diffusion which predicts its noise (DDPM)."""
    return _with_generator("ar_ddpm", kind="ddpm_eps")


def ar_ddpm_v() -> Config:
    """`karma_text` that searches by a DDPM which predicts the velocity."""
    return _with_generator("ar_ddpm_v", kind="ddpm_v")


def ar_edm() -> Config:
    """`karma_text` that searches by EDM."""
    return _with_generator("ar_edm", kind="edm")


def ar_fm() -> Config:
    """`karma_text` that searches by flow matching."""
    return _with_generator("ar_fm", kind="fm")


def _with_generator(name: str, **changes: Any) -> Config:
    base = _with_objective(name, 1.0, 1.0)
    generator = replace(base.model.generator, **changes)
    return replace(base, model=replace(base.model, generator=generator))


def hllm() -> Config:
    """HLLM-style (2409.12740): InfoNCE over cosines with a learned temperature, no decodability.

    Layout, pooling, warm-up and negatives are those of `action_only`; only the loss differs.
    """
    base = _with_objective("hllm", 0.0, 0.0)
    return replace(
        base,
        model=replace(base.model, score=replace(base.model.score, kind="cos_learned")),
        objective=replace(base.objective, action_loss="infonce"),
    )


def karma_llm() -> Config:
    """A pretrained LLM at little cost (docs/pretrained.md): `hllm` with a fixed block.

    Of the item encoder only the head is trained, so its layers run once for every item. Half of
    the block is counted words, half what the LLM says of an item.
    """
    base = hllm()
    encoder = replace(
        base.model.item_encoder, layers=12, train_layers=1, lexical=1024, block="both"
    )
    decoder = replace(base.model.user_decoder, layers=6)
    return replace(
        base,
        recipe="karma_llm",
        model=replace(base.model, item_encoder=encoder, user_decoder=decoder),
        warmup=replace(base.warmup, skip=True),
        training=replace(base.training, encoder_grad="head", steps=600, learning_rate=2e-4),
    )


def naive() -> Config:
    """`action_only` without what keeps embeddings apart: whitening, ramp and delay of other terms.

    All other settings are those of the paper; the tasks of decodability can be added to it.
    """
    base = _with_objective("naive", 0.0, 0.0)
    encoder = replace(base.model.item_encoder, whiten=False, lexical=0)
    return replace(
        base,
        model=replace(base.model, item_encoder=encoder),
        objective=replace(base.objective, hard_ramp=0.0, duplicate_cosine=1.0),
        training=replace(base.training, encoder_delay=0.0),
    )


def frozen_encoder() -> Config:
    """`action_only` with the pretrained item encoder frozen: only the user decoder is trained."""
    base = _with_objective("frozen_encoder", 0.0, 0.0)
    return replace(base, training=replace(base.training, encoder_grad="frozen"))


def sasrec() -> Config:
    """SASRec (1808.09781) over item ids and query words, with L_act (docs/baselines.md)."""
    base = _with_objective("sasrec", 0.0, 0.0)
    return replace(base, model=replace(base.model, kind="sasrec"))


def hstu() -> Config:
    """HSTU (2402.17152) over item ids and query words, with L_act (docs/baselines.md)."""
    base = _with_objective("hstu", 0.0, 0.0)
    return replace(base, model=replace(base.model, kind="hstu"))


def toy() -> Config:
    """`karma_text` with a size and a loss that win within minutes on two CPU cores.

    It uses InfoNCE and the lexical block, as in docs/results.md. The tables of a study train the
    toy shop with the paper's pairwise loss (`studies/plan.py`).
    """
    base = karma_text()
    tiny = TinyBackboneConfig(
        hidden_size=64, num_layers=2, num_heads=4, num_key_value_heads=2, intermediate_size=192,
        vocab_size=2048,
    )  # fmt: skip
    encoder = replace(base.model.item_encoder, lexical=64)
    score = replace(base.model.score, scale=20.0)
    return replace(
        base,
        recipe="toy",
        model=replace(base.model, tiny=tiny, item_encoder=encoder, score=score),
        pretrain=replace(base.pretrain, steps=200),
        warmup=replace(base.warmup, steps=200),
        objective=replace(base.objective, action_loss="infonce", hard_ramp=0.05, lambda_dec=0.1),
        # An encoder that starts with the decoder loses the user's taste; one that starts late
        # does not learn to place new items (docs/log.md, L37).
        training=replace(
            base.training, steps=850, batch_size=48, learning_rate=2e-3, encoder_delay=0.2,
            encoder_lr=0.5,
        ),
        evaluation=replace(base.evaluation, max_examples=3000),
    )  # fmt: skip


TRAINED: dict[str, Callable[[], Config]] = {
    "action_only": action_only,
    "history_to_text": history_to_text,
    "embedding_to_text": embedding_to_text,
    "karma_text": karma_text,
    "karma_multimodal": karma_multimodal,
    "action_only_unwarmed": action_only_unwarmed,
    "null_detached": null_detached,
    "null_detached_separate": null_detached_separate,
    "null_shuffled": null_shuffled,
    "null_both_shuffled": null_both_shuffled,
    "ar_mse": ar_mse,
    "ar_ddpm": ar_ddpm,
    "ar_ddpm_v": ar_ddpm_v,
    "ar_edm": ar_edm,
    "ar_fm": ar_fm,
    "hllm": hllm,
    "karma_llm": karma_llm,
    "naive": naive,
    "frozen_encoder": frozen_encoder,
    "sasrec": sasrec,
    "hstu": hstu,
    "toy": toy,
}
RANKERS = {
    "ctr_din": "click-through rates by DIN over item ids, attributes and query words",
    "ctr_simtier": "`ctr_din` with similarities of the item vectors of --vectors",
    "ctr_sarm": "`ctr_din` with text anchors of items, decoded from their vectors of --vectors",
    "ctr_ocarm": "`ctr_din` whose user vector learns from a teacher that reads the later clicks",
    "ctr_qarm": "`ctr_din` with semantic ids of --codes, and a long history searched by vector",
}
"""CTR models, `ctr_` and the family in ranking/families.py, with what each ranks by."""
MADE_FOR_LLM = {"karma_llm": ("training.learning_rate",)}
"""Recipes that cannot be run without a pretrained LLM -> what they set other than
`pretrained.PRETRAINED`."""
UNTRAINED = {
    "popularity": "items by their training clicks",
    "tfidf": "word overlap with the query, rare words weighing more",
    "bm25": "word overlap with the query, by BM25",
    "llm": "cosine of a pretrained LLM's text vectors to those of the query and the history",
    "query_filter": "items that match the query, in random order",
    "query_filter_popular": "items that match the query, by their training clicks",
    "affinity": "items that match the query, by the attributes that the user clicked before",
    "llm_affinity": "items that match the query, by an LLM's text vectors of the history",
    "oracle": "the best ranking from query and history, where the truth is known",
    "taste_oracle": "the ranking of someone who knows the user's taste, where the truth is known",
}
"""Floors and ceilings, with what each ranks by."""
CEILINGS = ("oracle", "taste_oracle")
FLOORS = tuple(name for name in UNTRAINED if name not in CEILINGS)
LLM_FLOORS = ("llm", "llm_affinity")
"""Floors that rank by a pretrained LLM; they need a configuration that names one."""


def names() -> list[str]:
    """Return the names of all recipes."""
    return [*TRAINED, *RANKERS, *FLOORS, *CEILINGS]


def build(name: str) -> Config:
    """Return the full configuration of a recipe; raises InputError naming the choices."""
    if name in TRAINED:
        return TRAINED[name]()
    if name in RANKERS:
        return _ranker(name)
    if name in FLOORS or name in CEILINGS:
        return Config(recipe=name)
    raise InputError("--recipe", name, choices=names())


def _ranker(name: str) -> Config:
    """Return the configuration of a CTR model; a batch has some hundred pages, and no LLM."""
    base = Config(recipe=name, ranking=CTR[name])
    training = replace(
        base.training, batch_size=256, learning_rate=2e-2, precision="float32", best_metric="AUC"
    )
    return replace(base, training=training)


def describe_recipes() -> str:
    """A line for every recipe, for `--help`."""
    width = max(map(len, names()))
    lines = []
    for name in names():
        text = {**UNTRAINED, **RANKERS}.get(name)
        text = text or (TRAINED[name].__doc__ or "").partition("\n")[0].rstrip(".")
        lines.append(f"  {name:<{width}}  {text}")
    return "\n".join(lines)
