"""QARM in the ranker: what is searched, what learns, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from karma_ray.artifacts import write_table
from karma_ray.codes.config import CodesConfig
from karma_ray.codes.table import ItemCodes, code_catalog, load_codes
from karma_ray.data.catalog import Catalog
from karma_ray.errors import InputError
from karma_ray.ranking.batch import CtrBatch
from karma_ray.ranking.config import RankingConfig
from karma_ray.ranking.families import Sizes, build_model, facts_of
from karma_ray.ranking.items import ItemFacts
from karma_ray.ranking.objective import log_loss
from karma_ray.ranking.qarm import Qarm, nearest
from karma_ray.retrieval.encode import load_embeddings, save_embeddings
from karma_ray.retrieval.similarity import unit
from tests.tiny_run import items_table, write_data, write_run

ITEM_COUNT = 12
SMALL_CODES = CodesConfig(codewords=4, fsq_levels=(2, 2), iterations=5)
CONFIG = RankingConfig(
    family="qarm", width=4, hidden=8, attention_hidden=4, query_buckets=16, recent_items=2,
    gsu_items=3, max_history=6,
)  # fmt: skip


def facts(num_codes: int = 5) -> ItemFacts:
    draw = np.random.default_rng(0)
    codes = draw.integers(0, num_codes, (ITEM_COUNT, 2)).astype(np.int32)
    return ItemFacts(
        draw.integers(0, 3, (ITEM_COUNT, 2)),
        vectors=unit(draw.normal(size=(ITEM_COUNT, 8)).astype(np.float32)),
        codes=ItemCodes([str(n) for n in range(ITEM_COUNT)], codes, [num_codes, num_codes]),
    )


def model_of(config: RankingConfig = CONFIG, known: ItemFacts | None = None) -> Qarm:
    known = known or facts()
    model = build_model(config, Sizes.of(known))
    assert isinstance(model, Qarm)
    model.items.know(known)
    model.know(known)
    return model


def batch(history: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]) -> CtrBatch:
    sizes = [len(page) for page in candidates]
    return CtrBatch(
        history=torch.tensor(history),
        query=torch.ones(len(sizes), 1, dtype=torch.long),
        request=torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)),
        candidate=torch.tensor([row for page in candidates for row in page]),
        features=torch.zeros(sum(sizes), 0),
        clicked=torch.arange(sum(sizes)).remainder(2).float(),
    )


PAGES = batch([[-1, -1, 3, 7, 7, 1], [0, 2, 4, 6, 8, 10]], [[5, 9], [11, 1, 2]])


def logits(model: torch.nn.Module, given: CtrBatch) -> torch.Tensor:
    return model(*given.named(model.inputs))


def test_the_nearest_clicks_by_hand() -> None:
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 90.0, 180.0, 20.0]))
    vectors = torch.cat([torch.zeros(1, 2), torch.stack([angles.cos(), angles.sin()], 1)])
    history = torch.tensor([[3, 2, 4, 1], [-1, -1, -1, 3]])
    found = nearest(vectors, history, torch.tensor([0, 0, 0, 1]), torch.tensor([0, 3, -1, 0]), 2)
    assert found.tolist() == [[1, 4], [3, 2], [-1, -1], [3, -1]]


def test_each_page_is_searched_as_if_it_were_alone() -> None:
    vectors = torch.nn.functional.pad(torch.from_numpy(facts().vectors), (0, 0, 1, 0))
    history, request, candidate = PAGES.history, PAGES.request, PAGES.candidate
    found = nearest(vectors, history, request, candidate, 3)
    for number, (page, item) in enumerate(zip(request.tolist(), candidate.tolist(), strict=True)):
        clicks = [row for row in history[page].tolist() if row >= 0]
        score = {row: float(vectors[row + 1] @ vectors[item + 1]) for row in clicks}
        expected = sorted(clicks, key=lambda row: -score[row])[:3]
        assert found[number].tolist() == expected


def test_the_gradient_reaches_the_tables_of_codes_and_not_the_vectors() -> None:
    model = model_of()
    log_loss(model, PAGES, logits(model, PAGES)).sum().backward()
    shown = {*PAGES.candidate.tolist(), *PAGES.history.flatten().tolist()} - {-1}
    for level, table in enumerate(model.items.of_level):
        learnt = set(table.weight.grad.abs().sum(1).nonzero().flatten().tolist())
        assert learnt and learnt <= {int(model.items.codes[row + 1, level]) for row in shown}
    assert not model.vectors.requires_grad


def test_an_item_embedding_is_the_sum_of_its_parts() -> None:
    items = model_of().items
    rows = torch.tensor([4, -1])
    expected = items.base(rows)[0] + sum(
        table.weight[items.codes[5, level]] for level, table in enumerate(items.of_level)
    )
    torch.testing.assert_close(items(rows)[0], expected)
    assert not items(rows)[1].any()


def test_items_with_the_same_codes_share_what_is_learnt() -> None:
    known = facts(num_codes=1)  # all items have the same codes
    model = model_of(known=known)
    model.items.forget(np.array([5]))
    with torch.no_grad():
        before = model.items(torch.tensor([5]))
        model.items.of_level[0].weight[1] += 1.0
        torch.testing.assert_close(model.items(torch.tensor([5])), before + 1.0)


def test_codes_of_forgotten_items_alone_are_forgotten() -> None:
    known = facts()
    own = np.arange(ITEM_COUNT, dtype=np.int32)[:, None]
    model = model_of(known=replace(known, codes=ItemCodes([], own, [ITEM_COUNT])))
    model.items.forget(np.array([3, 5]))
    kept = model.items.of_level[0].weight[1:].any(1)
    assert kept.tolist() == [row not in (3, 5) for row in range(ITEM_COUNT)]


def test_a_click_outside_the_newest_counts_only_if_it_is_near() -> None:
    model = model_of().eval()
    found = nearest(model.vectors, PAGES.history, PAGES.request, PAGES.candidate, 3)
    far = next(row for row in PAGES.history[1, :4].tolist() if row not in found[2].tolist())
    changed = PAGES.history.clone()
    changed[1][PAGES.history[1] == far] = -1
    one = logits(model, PAGES)[2]
    torch.testing.assert_close(logits(model, replace(PAGES, history=changed))[2], one)
    near = PAGES.history.clone()
    near[1][near[1] == found[2, 0]] = -1
    assert (logits(model, replace(PAGES, history=near))[2] - one).abs() > 1e-7


def test_own_clicks_and_other_pages_change_nothing() -> None:
    model = model_of().eval()
    expected = logits(model, PAGES)
    clicked = replace(PAGES, clicked=1 - PAGES.clicked)
    torch.testing.assert_close(logits(model, clicked), expected)
    alone = batch([PAGES.history[1].tolist()], [[11, 1, 2]])
    torch.testing.assert_close(logits(model, alone), expected[2:])
    longer = replace(PAGES, history=torch.nn.functional.pad(PAGES.history, (5, 0), value=-1))
    torch.testing.assert_close(logits(model, longer), expected)


def test_a_traced_model_gives_the_same_logits() -> None:
    model = model_of().eval()
    other = batch([[2, 3, 4, 5, 6, 7]] * 3, [[1], [2, 3, 4], [5, 6]])
    torch.testing.assert_close(
        torch.fx.symbolic_trace(model)(*other.named(model.inputs)), logits(model, other)
    )


def test_without_search_only_the_newest_clicks_are_read() -> None:
    model = model_of(replace(CONFIG, gsu_items=0)).eval()
    changed = PAGES.history.clone()
    changed[:, :-2] = 9
    torch.testing.assert_close(logits(model, replace(PAGES, history=changed)), logits(model, PAGES))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(run with codes of its embeddings, its data)."""
    root = tmp_path_factory.mktemp("qarm")
    data, out = write_data(root), write_run(root)
    code_catalog(f"{out}/item_embeddings", f"{out}/item_codes", SMALL_CODES)
    return out, data


def test_codes_and_vectors_come_in_the_order_of_the_catalogue(run: tuple[str, str]) -> None:
    out, data = run
    config = replace(CONFIG, vectors=out)
    found = facts_of(config, data, "")
    table, codes = load_embeddings(f"{out}/item_embeddings"), load_codes(f"{out}/item_codes")
    ids = Catalog.load(data).item_ids
    assert found.codes is not None and found.codes.item_ids == ids
    place = [codes.item_ids.index(item) for item in ids]
    np.testing.assert_array_equal(found.codes.codes, codes.codes[place])
    np.testing.assert_allclose(found.vectors, unit(table.in_order(ids).embeddings))
    assert set(found.parents) == {"item_codes", "embeddings", "codebooks"}
    alone = facts_of(replace(config, codes="none"), data, "")
    assert alone.codes is None and alone.vectors is not None


def test_codes_of_other_embeddings_are_refused(run: tuple[str, str], tmp_path: Path) -> None:
    out, data = run
    other = write_run(tmp_path, seed=1)
    theirs = str(tmp_path / "codes")
    code_catalog(f"{other}/item_embeddings", theirs, SMALL_CODES)
    with pytest.raises(InputError, match="codes of other embeddings"):
        facts_of(replace(CONFIG, vectors=out, codes=theirs), data, "")
    with pytest.raises(InputError, match="no finished folder of codes"):
        facts_of(replace(CONFIG, vectors=other), data, "")
    with pytest.raises(InputError, match="gsu_items"):
        facts_of(replace(CONFIG, vectors=out, codes="none", gsu_items=0), data, "")


def test_codes_of_another_catalogue_are_refused(run: tuple[str, str], tmp_path: Path) -> None:
    fewer = str(tmp_path / "fewer")
    write_table(items_table().slice(1), f"{fewer}/items")
    for gsu_items in (0, 3):
        with pytest.raises(InputError, match="of another catalogue"):
            facts_of(replace(CONFIG, vectors=run[0], gsu_items=gsu_items), fewer, "")


def test_aligned_codes_are_searched_by_aligned_vectors(run: tuple[str, str]) -> None:
    out, data = run
    table = load_embeddings(f"{out}/item_embeddings")
    turned = np.roll(table.embeddings, 1, axis=0)
    save_embeddings(replace(table, embeddings=turned), f"{out}/aligned_embeddings")
    aligned = f"{out}/item_codes-aligned"
    code_catalog(f"{out}/aligned_embeddings", aligned, SMALL_CODES)
    found = facts_of(replace(CONFIG, vectors=out, codes=aligned), data, "")
    expected = replace(table, embeddings=turned).in_order(Catalog.load(data).item_ids)
    np.testing.assert_allclose(found.vectors, unit(expected.embeddings))
