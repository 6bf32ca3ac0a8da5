"""A run whose items hold their words: counted once, left alone by training, served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from karma_ray import recipes
from karma_ray.artifacts import read_json
from karma_ray.config import override
from karma_ray.errors import InputError
from karma_ray.metrics.collapse import effective_rank
from karma_ray.model.lexical import LexicalBlock
from karma_ray.retrieval.retriever import Retriever
from karma_ray.runs.pipeline import evaluate_run, train_run
from karma_ray.runs.stages import finished_stage
from tests.runs.test_lora_run import SMALL

pytestmark = pytest.mark.usefixtures("blank_pictures")

SIZE = 16


def test_the_words_of_the_catalogue_are_served_as_counted(
    shop: str,
    tmp_path: Path,
) -> None:
    run, cache = (str(tmp_path / name) for name in ("run", "cache"))
    config = override(recipes.build("toy"), [*SMALL, f"model.item_encoder.lexical={SIZE}"])
    for value, why in (
        ("-1", "should be greater than or equal to 0"),
        ("240", "must be below .* items, 240"),
    ):
        with pytest.raises(InputError, match=rf"lexical: {value} {why}"):
            wrong = override(config, [f"model.item_encoder.lexical={value}"])
            train_run(wrong, shop, run, cache=cache)
    assert not (tmp_path / "cache").exists()  # before anything is pretrained
    metrics = train_run(config, shop, run, cache=cache)
    assert evaluate_run(run, cache=cache)[1] == pytest.approx(metrics, rel=1e-6)

    stage = finished_stage(run, read_json(f"{run}/data.json")["uri"])
    tokens, lengths = stage.collator().catalog_tokens()
    model = stage.build_trained().interest
    counted = LexicalBlock(len(model.item_encoder.words.weight), SIZE, model.width - SIZE)
    counted.fit(tokens, lengths)
    torch.testing.assert_close(model.item_encoder.words.weight, counted.weight)
    words = counted(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(lengths))
    table = Retriever.load(run, shop).table.in_order(stage.catalog().item_ids)
    assert read_json(f"{run}/bundle/manifest.json")["width"] == table.embeddings.shape[1]
    held = torch.from_numpy(np.array(table.embeddings[:, -SIZE:], dtype=np.float32))
    cosine = torch.nn.functional.cosine_similarity(held, words, dim=1)
    assert (cosine > 0.999).all()
    assert model.user_decoder.lexical_weight != 1
    learned = torch.from_numpy(np.array(table.embeddings[:, :-SIZE], dtype=np.float32))
    assert metrics["collapse/effective_rank_e"] == pytest.approx(effective_rank(learned), rel=1e-3)
