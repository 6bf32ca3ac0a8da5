"""The tables of a study: the paper's two tables, the baselines and the switches.

Published numbers are differences in points (arXiv 2603.22779, Tables 1 and 2); the paper gives no
absolute values. Rows without numbers are controls and rivals that the paper does not report.
"""

from __future__ import annotations

from karma_ray import recipes
from karma_ray.studies import switches
from karma_ray.studies.rows import Row, Table


def _published(gauc: float, hr200: float, hr1000: float, js50: float) -> dict[str, float]:
    return {"gAUC": gauc, "HR@200": hr200, "HR@1000": hr1000, "JS@50": js50}


_TABLE1 = (
    Row("action_only", "Pairwise CE, clicks alone"),
    Row("action_only_unwarmed", "the same without warm-up (control)"),
    Row("history_to_text", "with Task 1", published=_published(0.43, 4.81, 3.46, -0.87)),
    Row("embedding_to_text", "with Task 2", published=_published(0.43, 19.19, 19.31, 2.65)),
    Row("karma_text", "with Tasks 1 and 2", published=_published(0.97, 22.57, 21.19, 2.26)),
    Row(
        "karma_multimodal", "with Tasks 1, 2 and visual", needs_images=True,
        published=_published(1.38, 10.83, 8.41, 0.40), published_over="karma_text",
    ),
    Row("null_detached", "Task 2, h detached, decoder shared (null)"),
    Row("null_detached_separate", "Task 2, h detached, decoder separate (null)"),
    Row("null_shuffled", "Task 2 with other items' texts (null)"),
    Row("null_both_shuffled", "Task 1, and Task 2 with other items' texts (null)"),
)  # fmt: skip

_GENERATORS: tuple[tuple[str, str, tuple[str, ...], dict[str, float]], ...] = (
    ("ar_mse", "AR + MSE", (), _published(0.63, 4.21, 1.70, 0.85)),
    ("ar_ddpm", "AR + DDPM, eps", (), _published(0.17, 0.80, -1.01, 0.37)),
    ("ar_ddpm_v", "AR + DDPM, v", (), {}),
    ("ar_edm", "AR + EDM", (), _published(-0.12, -2.95, -3.30, -0.33)),
    ("ar_fm", "AR + flow matching", (), _published(0.02, -0.83, -2.68, 0.26)),
)


def _generated(mode: str) -> tuple[Row, ...]:
    """Return Table 2's rows, which do not say whether L_act is kept, for one `gen_mode`."""
    return tuple(
        Row(
            f"{name}_{mode}", f"{title}, {mode}", recipe=name,
            settings=(*settings, f"objective.gen_mode={mode}"), published=published,
        )
        for name, title, settings, published in _GENERATORS
    )  # fmt: skip


_OVER_INFONCE = ("objective.action_loss=infonce", "model.score.kind=cos_learned")
"""Settings that turn `action_only` into `hllm`."""
_HLLM = Row("hllm", "HLLM-style (text, InfoNCE)")
_KARMA_INFONCE = Row(
    "karma_infonce", "KARMA, text, over HLLM's loss", recipe="karma_text", settings=_OVER_INFONCE
)


_LOGQ = "objective.logq=true"


_NAIVE = (
    "training.encoder_delay=0", "training.encoder_lr=1", "objective.hard_weight=1",
)  # fmt: skip
"""Undoes what a data set's settings protect embeddings by."""


def _naive(name: str, title: str, *settings: str) -> Row:
    return Row(name, title, recipe="naive", settings=(*_NAIVE, *settings))


def _over_infonce(recipe: str, title: str) -> Row:
    return Row(f"{recipe}_infonce", title, recipe=recipe, settings=_OVER_INFONCE)


TABLES = {
    "table1": Table("Table 1: semantic decodability", "action_only", _TABLE1),
    "table2": Table(
        "Table 2: generators of the retrieval embedding",
        "karma_text",
        (Row("karma_text", "Tasks 1 and 2, no generator"), *_generated("add"),
         *_generated("replace")),
    ),
    "baselines": Table(
        "Baselines",
        "karma_text",
        (
            *(Row(name, name) for name in recipes.FLOORS),
            Row("sasrec", "SASRec (ids)"),
            Row("hstu", "HSTU (ids)"),
            _HLLM,
            Row(
                "hllm_logq", "HLLM-style, in-batch negatives corrected for popularity",
                recipe="hllm", settings=(_LOGQ,),
            ),
            Row(
                "karma_llm", "a pretrained LLM, InfoNCE, words and LLM in a fixed block",
                settings=("training.encoder_delay=0", "training.encoder_lr=1",
                          "training.steps=600"),
            ),
            Row("frozen_encoder", "frozen text encoder, trained user decoder"),
            Row("action_only", "Pairwise CE, clicks alone"),
            Row("karma_text", "KARMA, text"),
            _KARMA_INFONCE,
            Row(
                "karma_infonce_logq", "KARMA, text, over HLLM's loss so corrected",
                recipe="karma_text", settings=(*_OVER_INFONCE, _LOGQ),
            ),
            *(Row(name, f"{name} (ceiling)") for name in recipes.CEILINGS),
        ),
    ),
    "infonce": Table(
        "Semantic decodability over HLLM's loss",
        "hllm",
        (
            _HLLM,
            _over_infonce("embedding_to_text", "Task 2 over HLLM's loss"),
            _KARMA_INFONCE,
            _over_infonce(
                "null_shuffled", "Task 2 with other items' texts, over HLLM's loss (null)"
            ),
            _over_infonce(
                "null_both_shuffled",
                "Task 1, and Task 2 with other items' texts, over HLLM's loss (null)",
            ),
        ),
    ),
    "naive": Table(
        "Semantic decodability without what keeps embeddings apart",
        "naive",
        (
            _naive("naive", "Clicks alone"),
            _naive("naive_task2", "with Task 2", "objective.reconstruction=1"),
            _naive(
                "naive_karma", "with Tasks 1 and 2", "objective.generation=1",
                "objective.reconstruction=1",
            ),
            _naive(
                "naive_shuffled", "Task 2 with other items' texts (null)",
                "objective.reconstruction=1", "model.decodability.recon_text=shuffled",
            ),
        ),
    ),
    **switches.TABLES,
}  # fmt: skip
"""The tables that `jobs/ablate.py` can run."""
