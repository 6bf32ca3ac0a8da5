"""Where a stage finds visual features, and what it does without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from karma_ray import recipes
from karma_ray.config import Config, override
from karma_ray.data.visual import features_uri, write_visual_features
from karma_ray.errors import InputError
from karma_ray.model.karma import KarmaModel
from karma_ray.runs.stage_images import build_imagery, features_hash, load_visual, visual_uri
from karma_ray.runs.warm_up import warmup_key
from karma_ray.training.checkpoints.checkpoint import save_weights
from tests import pictures, tiny


def _config(*changes: str) -> Config:
    return override(recipes.karma_multimodal(), changes)


def _write(folder: str, seed: int = 0) -> None:
    values = np.random.default_rng(seed).standard_normal((49, 3, 6)).astype(np.float32)
    write_visual_features(folder, list(tiny.catalog().item_ids), values, "items")


def test_features_stand_in_the_data_folder_or_where_the_field_says(tmp_path: Path) -> None:
    _write(features_uri(str(tmp_path)))
    _write(str(tmp_path / "other"), seed=1)
    assert visual_uri(_config(), str(tmp_path)) == features_uri(str(tmp_path))
    elsewhere = _config(f"collate.visual_features={tmp_path}/other")
    assert visual_uri(elsewhere, str(tmp_path)) == str(tmp_path / "other")
    found, other = (load_visual(c, str(tmp_path), tiny.catalog()) for c in (_config(), elsewhere))
    assert found is not None and other is not None
    assert (found.num_tokens, found.width) == (3, 6)
    assert not np.array_equal(found.values, other.values)


def test_missing_features_name_the_command_that_makes_them(tmp_path: Path) -> None:
    message = f"collate.visual_features: .* python jobs/features.py {tmp_path}"
    for ask in (
        lambda: load_visual(_config(), str(tmp_path), tiny.catalog()),
        lambda: build_imagery(_config(), str(tmp_path), tiny.model().interest, None),
        lambda: warmup_key(_config(), "h", str(tmp_path)),
    ):
        with pytest.raises(InputError, match=message):
            ask()


@pytest.mark.parametrize("off", ["objective.lambda_img=0", "objective.lambda_dec=0"])
def test_a_run_without_a_visual_term_asks_for_no_features(tmp_path: Path, off: str) -> None:
    config = _config(off)
    assert load_visual(config, str(tmp_path), tiny.catalog()) is None
    assert build_imagery(config, str(tmp_path), tiny.model().interest, None) is None
    assert features_hash(config, str(tmp_path)) == ""
    named = override(config, [f"collate.visual_features={tmp_path}"])
    plain = warmup_key(recipes.karma_text(), "h")
    assert warmup_key(named, "h", str(tmp_path)) == plain == warmup_key(config, "h")


def test_the_warm_up_of_a_visual_term_depends_on_what_it_reconstructs(tmp_path: Path) -> None:
    _write(features_uri(str(tmp_path)))
    keys = [
        warmup_key(_config(*changes), "h", str(tmp_path))
        for changes in ([], ["objective.lambda_img=0.1"], ["model.imagery.img_head=edm"])
    ]
    keys.append(warmup_key(recipes.karma_text(), "h"))
    _write(features_uri(str(tmp_path)), seed=1)
    keys.append(warmup_key(_config(), "h", str(tmp_path)))
    assert all(one != other for n, one in enumerate(keys) for other in keys[:n])


def test_a_finished_model_needs_no_features_any_more(tmp_path: Path) -> None:
    karma = pictures.model()
    save_weights(str(tmp_path), karma)
    again = build_imagery(_config(), "nowhere", tiny.model().interest, str(tmp_path))
    assert again is not None and again.shape == pictures.SHAPE
    bare = KarmaModel(karma.interest, karma.tokenizer)
    save_weights(str(tmp_path / "text"), bare)
    with pytest.raises(InputError, match="has no image queries"):
        build_imagery(_config(), "nowhere", tiny.model().interest, str(tmp_path / "text"))
