"""Equations 4 and 9: a weighted sum of the terms that were built."""

from __future__ import annotations

import pytest
import torch

from karma_ray.errors import InputError
from karma_ray.objectives.losses import (
    LossTerms,
    ObjectiveConfig,
    hard_weight_at,
)

ACTION, GENERATION, RECONSTRUCTION = (torch.tensor(value) for value in (1.0, 10.0, 100.0))


def test_the_total_is_the_papers_weighted_sum() -> None:
    config = ObjectiveConfig(lambda_dec=0.5, generation=2.0, reconstruction=0.1)
    total = LossTerms(ACTION, GENERATION, RECONSTRUCTION).total(config)
    assert total.item() == pytest.approx(1 + 0.5 * (2.0 * 10 + 0.1 * 100))


def test_the_image_term_is_weighed_beside_the_texts() -> None:
    config = ObjectiveConfig(lambda_dec=0.5, lambda_img=0.3)
    terms = LossTerms(ACTION, image=torch.tensor(20.0))
    assert terms.total(config).item() == pytest.approx(1 + 0.5 * 0.3 * 20)
    assert terms.named()["loss/image"].item() == 20.0
    assert config.built.image and not ObjectiveConfig().built.image
    assert not ObjectiveConfig(lambda_dec=0.0, lambda_img=0.3).built.image


def test_the_defaults_are_equation_nine_with_lambda_one() -> None:
    terms = LossTerms(ACTION, GENERATION, RECONSTRUCTION)
    assert terms.total(ObjectiveConfig()).item() == 111.0


def test_a_term_that_was_not_built_is_neither_summed_nor_named() -> None:
    terms = LossTerms(ACTION, reconstruction=RECONSTRUCTION)
    assert terms.total(ObjectiveConfig()).item() == 101.0
    assert set(terms.named()) == {"loss/action", "loss/reconstruction"}


def test_logged_terms_are_raw_not_weighted() -> None:
    named = LossTerms(ACTION, GENERATION, RECONSTRUCTION).named()
    assert {name: value.item() for name, value in named.items()} == {
        "loss/action": 1.0,
        "loss/generation": 10.0,
        "loss/reconstruction": 100.0,
    }


@pytest.mark.parametrize(
    ("weights", "built"),
    [
        ({}, (True, True)),
        ({"lambda_dec": 0.0}, (False, False)),
        ({"generation": 0.0}, (False, True)),
        ({"reconstruction": 0.0}, (True, False)),
    ],
)
def test_a_weight_of_zero_means_not_built(
    weights: dict[str, float], built: tuple[bool, bool]
) -> None:
    config = ObjectiveConfig(**weights)  # type: ignore[arg-type]
    assert (config.built.generation, config.built.reconstruction) == built


def test_hard_negatives_wait_then_count_more_and_more() -> None:
    config = ObjectiveConfig(hard_weight=2.0, hard_ramp=0.1)
    at = [hard_weight_at(config, progress) for progress in (0.0, 0.1, 0.15, 0.2, 1.0)]
    assert at == pytest.approx([0.0, 0.0, 1.0, 2.0, 2.0])
    assert hard_weight_at(ObjectiveConfig(hard_weight=2.0, hard_ramp=0.0), 0.0) == 2.0


@pytest.mark.parametrize("loss", ["pairwise", "bce", "mse"])
def test_a_loss_without_a_softmax_has_no_correction_for_popularity(loss: str) -> None:
    config = ObjectiveConfig(action_loss=loss, logq=True)  # type: ignore[arg-type]
    message = rf"objective\.logq: True .*action_loss={loss} .*choices: false, .*=infonce"
    with pytest.raises(InputError, match=message):
        config.check()
    ObjectiveConfig(action_loss=loss).check()  # type: ignore[arg-type]
    ObjectiveConfig(action_loss="infonce", logq=True).check()
