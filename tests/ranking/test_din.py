"""DIN: what reaches it, what does not, and that it can be traced."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from karma_ray.errors import InputError
from karma_ray.ranking.batch import CtrBatch
from karma_ray.ranking.config import RankingConfig
from karma_ray.ranking.families import FAMILIES, Sizes, build_model, family_of
from karma_ray.ranking.features import num_features
from karma_ray.ranking.objective import log_loss

SIZES = Sizes(num_items=30, attributes=[5, 4])
SMALL = RankingConfig(family="din", width=4, hidden=8, attention_hidden=4, query_buckets=16)
both = pytest.mark.parametrize("family", ["din", "simtier"])


def small(family: str) -> RankingConfig:
    return replace(SMALL, family=family, interest=FAMILIES[family].uses_vectors)


def batch(config: RankingConfig, seed: int = 0) -> CtrBatch:
    """Three pages of four candidates; the second page has an empty history and no query."""
    draw = torch.Generator().manual_seed(seed)
    history = torch.randint(0, 30, (3, 5), generator=draw)
    history[0, :2], history[1] = -1, -1
    query = torch.randint(1, 16, (3, 2), generator=draw)
    query[1], query[2, 1] = 0, 0
    count = num_features(config.interest) if family_of(config).uses_vectors else 0
    return CtrBatch(
        history=history,
        query=query,
        request=torch.arange(3).repeat_interleave(4),
        candidate=torch.randint(0, 30, (12,), generator=draw),
        features=torch.rand(12, count, generator=draw),
        clicked=(torch.rand(12, generator=draw) > 0.5).float(),
    )


def logits(model: torch.nn.Module, given: CtrBatch) -> torch.Tensor:
    return model(*given.named(model.inputs))


@both
def test_the_gradient_reaches_every_parameter(family: str) -> None:
    config = small(family)
    model, given = build_model(config, SIZES), batch(config)
    model.items.attributes[1:] = 1  # items with attributes
    log_loss(model, given, logits(model, given)).sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@both
def test_a_page_does_not_depend_on_the_others(family: str) -> None:
    config = small(family)
    model, given = build_model(config, SIZES).eval(), batch(config)
    alone = CtrBatch(
        given.history[1:2], given.query[1:2], torch.zeros(4, dtype=torch.long),
        given.candidate[4:8], given.features[4:8], given.clicked[4:8],
    )  # fmt: skip
    torch.testing.assert_close(logits(model, alone), logits(model, given)[4:8])


@both
def test_padding_changes_nothing(family: str) -> None:
    config = small(family)
    model, given = build_model(config, SIZES).eval(), batch(config)
    longer = replace(
        given,
        history=torch.nn.functional.pad(given.history, (3, 0), value=-1),
        query=torch.nn.functional.pad(given.query, (0, 2)),
    )
    torch.testing.assert_close(logits(model, longer), logits(model, given))


@both
def test_a_traced_model_gives_the_same_logits(family: str) -> None:
    config = small(family)
    model = build_model(config, SIZES).eval()
    traced, other = torch.fx.symbolic_trace(model), batch(config, seed=1)
    torch.testing.assert_close(traced(*other.named(model.inputs)), logits(model, other))


def test_a_new_model_depends_on_its_seed_alone() -> None:
    first, again, other = (build_model(SMALL, SIZES, seed) for seed in (0, 0, 1))
    assert torch.equal(first.fusion.weight, again.fusion.weight)
    assert not torch.equal(first.fusion.weight, other.fusion.weight)


def test_an_unknown_family_is_refused_with_the_choices() -> None:
    with pytest.raises(InputError, match=r"ranking\.family: 'dien' is not valid; choices: din"):
        family_of(replace(SMALL, family="dien"))
