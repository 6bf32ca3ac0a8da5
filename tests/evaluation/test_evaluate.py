"""The evaluation every ranker goes through."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from karma_ray.data.catalog import Catalog
from karma_ray.data.prepared import QueryMatches
from karma_ray.data.schema import EXAMPLES, QUERY_MATCHES
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.evaluation.config import EvaluationConfig
from karma_ray.evaluation.evaluate import evaluate
from karma_ray.metrics import ranking

NUM_ITEMS = 60
CONFIG = EvaluationConfig(block_size=7)
ALIKE = ("HR@", "NDCG", "MRR", "JS@", "gAUC")


def make_catalog(order: np.ndarray | None = None) -> Catalog:
    generator = np.random.default_rng(0)
    words = [f"w{number}" for number in range(15)]
    rows = [
        {"item_id": f"i{number}", "title": " ".join(generator.choice(words, 4))}
        for number in range(NUM_ITEMS)
    ]
    names = ("item_id", "title", "text", "brand", "category")
    table = pa.Table.from_pylist(rows, schema=pa.schema([(name, pa.string()) for name in names]))
    return Catalog(table if order is None else table.take(order))


def make_matches(catalog: Catalog) -> QueryMatches:
    rows = [
        {"query": f"q{group}", "item_ids": [f"i{n}" for n in range(group, NUM_ITEMS, 4)]}
        for group in range(4)
    ]
    return QueryMatches(catalog, pa.Table.from_pylist(rows, schema=QUERY_MATCHES))


def make_examples(num_pages: int = 40) -> pa.Table:
    """Pages of one or two clicks; some queries are null, some targets lie outside the query."""
    generator = np.random.default_rng(1)
    rows = []
    for page in range(num_pages):
        items = [f"i{n}" for n in generator.permutation(NUM_ITEMS)[:8]]
        positives = items[: 1 + page % 2]
        history = items[6:] + ([items[0]] if page % 3 == 0 else [])
        rows += [
            {
                "user_id": f"u{page % 9}",
                "query": None if page % 5 == 0 else f"q{page % 4}",
                "page_id": f"p{page}",
                "page_positive_ids": positives,
                "history_item_ids": history,
                "positive_item_id": positive,
                "hard_negative_ids": items[2:6],
            }
            for positive in positives
        ]
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


class Likes:
    """A fixed liking per item, shifted by the request's first history item; or any function."""

    def __init__(self, catalog: Catalog, levels: int = 1000) -> None:
        number = np.array([int(item_id[1:]) for item_id in catalog.item_ids])
        self.liking = np.random.default_rng(2).integers(0, levels, size=NUM_ITEMS)[number]
        self.number = number

    def score(self, examples: pa.Table) -> np.ndarray:
        first = [int(h[0][1:]) for h in examples.column("history_item_ids").to_pylist()]
        shift = (self.number[None, :] * (1 + np.array(first)[:, None])) % 7
        return (self.liking[None, :] + 100 * shift).astype(np.float32)


class Constant:
    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def score(self, examples: pa.Table) -> np.ndarray:
        return np.full((examples.num_rows, NUM_ITEMS), self.value, dtype=np.float32)


class Knowing:
    """Cheats: puts the target first."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog

    def score(self, examples: pa.Table) -> np.ndarray:
        rows = self.catalog.rows(examples.column("positive_item_id").to_pylist())
        return np.eye(NUM_ITEMS, dtype=np.float32)[rows]


def run(
    ranker=None,
    examples=None,
    catalog=None,
    config=CONFIG,
    warm=None,
    return_details=False,
    **options,
):
    catalog = catalog or make_catalog()
    warm_ids = {f"i{n}" for n in range(0, NUM_ITEMS, 2)}
    result = evaluate(
        ranker or Likes(catalog),
        make_examples() if examples is None else examples,
        catalog,
        config=config,
        train_item_ids=warm_ids if warm is None else warm,
        query_matches=make_matches(catalog),
        **options,
    )
    return result if return_details else result.metrics


def test_overall_metrics_equal_plain_loops() -> None:
    catalog, examples = make_catalog(), make_examples()
    scores = Likes(catalog, levels=5).score(examples)
    targets = catalog.rows(examples.column("positive_item_id").to_pylist())
    ranks = [sum(row >= row[target]) for row, target in zip(scores, targets, strict=True)]
    pages, aucs, sizes = examples.to_pylist(), [], []
    for position, page in enumerate(pages):
        if position and pages[position - 1]["page_id"] == page["page_id"]:
            continue
        pos, neg = (
            scores[position, catalog.rows(page[name])]
            for name in ("page_positive_ids", "hard_negative_ids")
        )
        aucs.append(np.mean([(p > n) + 0.5 * (p == n) for p in pos for n in neg]))
        sizes.append(len(pos) + len(neg))
    metrics = run(Likes(catalog, levels=5))
    assert metrics["num_test"] == len(ranks) and metrics["num_gauc_groups"] == 40
    assert metrics["HR@10"] == pytest.approx(100 * np.mean(np.array(ranks) <= 10))
    assert metrics["MRR"] == pytest.approx(100 * np.mean(1 / np.array(ranks)))
    assert metrics["gAUC"] == pytest.approx(100 * np.average(aucs, weights=sizes))


def test_a_constant_ranker_hits_nothing_and_cannot_order_a_page() -> None:
    metrics = run(Constant())
    assert metrics["HR@10"] == metrics["HR@50"] == metrics["NDCG@10"] == 0.0
    assert metrics["HR@200"] == 100.0  # the catalogue is smaller
    assert metrics["gAUC"] == 50.0
    assert metrics["in_query/HR@10"] == 0.0


def test_a_ranker_that_knows_the_truth_has_everything() -> None:
    metrics = run(Knowing(make_catalog()))
    assert metrics["HR@10"] == metrics["NDCG@10"] == metrics["MRR"] == 100.0
    assert metrics["in_query/MRR"] == 100.0
    assert metrics["JS@50"] > metrics["JS@50_excl_gt"]


@pytest.mark.parametrize("levels", [5, 1000])
def test_block_size_changes_nothing(levels: int) -> None:
    ranker = Likes(make_catalog(), levels)
    assert run(ranker) == run(ranker, config=replace(CONFIG, block_size=1000))


@pytest.mark.parametrize("levels", [5, 1000])
def test_the_order_of_the_catalogue_changes_nothing(levels: int) -> None:
    order = np.random.default_rng(3).permutation(NUM_ITEMS)
    shuffled = make_catalog(order)
    assert run(Likes(shuffled, levels), catalog=shuffled) == pytest.approx(
        run(Likes(make_catalog(), levels))
    )


def test_the_order_of_the_examples_changes_nothing() -> None:
    examples = make_examples()
    order = np.random.default_rng(4).permutation(examples.num_rows)
    assert run(examples=examples.take(order)) == pytest.approx(run(examples=examples))


def test_sections_split_the_examples_and_their_means_add_up() -> None:
    metrics = run()
    for left, right in (("warm/", "cold/"), ("first/", "repeat/")):
        sizes = np.array([metrics[left + "num_test"], metrics[right + "num_test"]])
        assert sizes.sum() == metrics["num_test"] and sizes.min() > 0
        for name in ("HR@10", "MRR", "JS@50", "JS@50_excl_gt"):
            parts = [metrics[left + name], metrics[right + name]]
            assert np.average(parts, weights=sizes) == pytest.approx(metrics[name])


def test_an_id_set_and_a_mask_say_the_same() -> None:
    mask = np.arange(NUM_ITEMS) % 2 == 0
    assert run(warm=mask) == run()


def test_empty_sections_have_counts_and_no_metrics() -> None:
    metrics = run(warm=np.ones(NUM_ITEMS, dtype=bool))
    assert {key for key in metrics if key.startswith("cold/")} == {
        "cold/num_test", "cold/num_gauc_groups",
    }  # fmt: skip
    assert metrics["cold/num_test"] == 0
    nothing = run(examples=make_examples().slice(0, 0))
    assert set(nothing.values()) == {0}
    assert not any(mark in key for key in nothing for mark in ALIKE)


def test_metrics_are_never_nan() -> None:
    lonely = make_examples().slice(3, 1)
    for metrics in (run(), run(examples=lonely), run(Constant(-np.inf))):
        assert all(np.isfinite(value) for value in metrics.values())


def test_inside_the_query_only_its_own_items_compete() -> None:
    examples, catalog = make_examples(), make_catalog()
    matches, result = make_matches(catalog), run(return_details=True)
    scores, inside = Likes(catalog).score(examples), []
    for row, example in zip(scores, examples.to_pylist(), strict=True):
        target = int(example["positive_item_id"][1:])
        own = matches.rows(example["query"])
        named = example["query"] is not None and target in own
        inside.append(int(sum(row[own] >= row[target])) if named else 0)
    assert result.details.query_ranks.tolist() == inside
    assert result.metrics["in_query/num_test"] == np.count_nonzero(inside) > 0
    assert result.metrics["in_query/num_outside"] == inside.count(0) > 0


def test_a_target_unknown_to_the_catalogue_is_a_counted_miss() -> None:
    examples = make_examples()
    targets = ["gone", *examples.column("positive_item_id").to_pylist()[1:]]
    index = examples.column_names.index("positive_item_id")
    metrics = run(
        Knowing(make_catalog()), examples.set_column(index, "positive_item_id", [targets])
    )
    num = examples.num_rows
    assert metrics["num_unknown_target"] == 1 and metrics["num_test"] == num
    assert metrics["HR@1000"] == pytest.approx(100 * (num - 1) / num)


def test_any_hit_counts_a_request_once_by_its_best_click() -> None:
    result = run(config=replace(CONFIG, hr_unit="any_hit"), return_details=True)
    pages = make_examples().column("page_id").to_pylist()
    best: dict[str, int] = {}
    for page, rank in zip(pages, result.details.ranks.tolist(), strict=True):
        best[page] = min(rank, best.get(page, ranking.MISS))
    assert result.metrics["num_test"] == len(best) == 40
    assert result.metrics["HR@10"] == pytest.approx(100 * np.mean(np.array([*best.values()]) <= 10))
    assert result.metrics["HR@10"] >= run()["HR@10"]


def test_a_sampled_corpus_ranks_the_target_among_the_same_items_for_everyone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("karma_ray.evaluation.config.SMALLEST_CORPUS", 10)
    catalog, examples = make_catalog(), make_examples()
    order = np.argsort([zlib.crc32(item_id.encode()) for item_id in catalog.item_ids])
    sample = set(order[:20].tolist())
    scores = Likes(catalog).score(examples)
    targets = catalog.rows(examples.column("positive_item_id").to_pylist()).tolist()
    expected = [
        sum(row[item] >= row[target] for item in {*sample, target})
        for row, target in zip(scores, targets, strict=True)
    ]
    whole = run(return_details=True)
    result = run(config=replace(CONFIG, corpus="sampled:20"), return_details=True)
    assert result.details.ranks.tolist() == expected != whole.details.ranks.tolist()
    # The page's own judgements and the query's own items are what they were.
    for unchanged in ("query_ranks", "group_auc"):
        assert np.array_equal(getattr(result.details, unchanged), getattr(whole.details, unchanged))
    assert result.metrics["JS@50"] != whole.metrics["JS@50"]
    shuffled = make_catalog(np.random.default_rng(3).permutation(NUM_ITEMS))
    assert run(catalog=shuffled, config=replace(CONFIG, corpus="sampled:20")) == result.metrics
    for everything in ("sampled:60", "sampled:100"):
        assert run(config=replace(CONFIG, corpus=everything)) == whole.metrics


@pytest.mark.parametrize("corpus", ["", "ful", "sampled", "sampled:", "sampled:99", "sampled:-5"])
def test_a_corpus_that_cannot_be_read_is_refused_with_the_choices(corpus: str) -> None:
    with pytest.raises(InputError, match=r"evaluation\.corpus.*full.*sampled:N.*100"):
        run(config=replace(CONFIG, corpus=corpus))


def changed(**switch: str) -> set[str]:
    """The names of the whole test set's metrics that a switch of the evaluation changes."""
    before, after = run(), run(config=replace(CONFIG, **switch))
    assert before.keys() == after.keys()
    return {name for name in before if "/" not in name and before[name] != after[name]}


def test_switches_of_the_metrics_change_what_they_name_and_nothing_else() -> None:
    assert changed(gauc_weight="uniform") == changed(gauc_weight="positives") == {"gAUC"}
    assert changed(js_mode="pooled") == {"JS@50", "JS@50_excl_gt"}
    rates = {"HR@10", "HR@50", "NDCG@10", "MRR", "num_test"}
    assert changed(hr_unit="any_hit") == rates


def test_without_pages_every_example_is_its_own_request() -> None:
    examples = make_examples()
    index = examples.column_names.index("page_id")
    bare = examples.set_column(index, "page_id", pa.nulls(examples.num_rows, pa.string()))
    metrics = run(examples=bare, config=replace(CONFIG, hr_unit="any_hit"))
    assert metrics["num_test"] == metrics["num_gauc_groups"] == examples.num_rows


def test_the_sample_is_the_seeds_and_details_say_which_examples() -> None:
    small = replace(CONFIG, max_examples=11)
    result = run(config=small, seed=5, return_details=True)
    assert result.metrics["num_test"] == len(set(result.details.rows.tolist())) == 11
    assert run(config=small, seed=5) == result.metrics != run(config=small, seed=6)
    users = make_examples().take(result.details.rows).column("user_id").to_pylist()
    assert result.details.user_ids == users


def test_details_average_to_the_metrics() -> None:
    result = run(return_details=True)
    metrics, details = result.metrics, result.details
    assert 100 * ranking.hit(details.ranks, 10).mean() == pytest.approx(metrics["HR@10"])
    assert 100 * details.js.mean() == pytest.approx(metrics["JS@50"])
    value = np.average(details.group_auc, weights=details.group_weights)
    assert 100 * value == pytest.approx(metrics["gAUC"])
    assert len(details.group_user_ids) == metrics["num_gauc_groups"]


def test_nan_scores_are_refused_by_name() -> None:
    with pytest.raises(KarmaRayError, match="Constant: NaN"):
        run(Constant(np.nan))


def test_an_item_on_both_lists_of_a_page_counts_as_clicked() -> None:
    examples = make_examples()
    shown = examples.to_pylist()
    both = [[*row["hard_negative_ids"], *row["page_positive_ids"]] for row in shown]
    index = examples.column_names.index("hard_negative_ids")
    doubled = examples.set_column(index, "hard_negative_ids", pa.array(both, pa.list_(pa.string())))
    assert run(examples=doubled) == run(examples=examples)


@pytest.mark.parametrize("section", ["warm/", "repeat/"])
def test_a_sections_gauc_judges_its_clicks_against_the_whole_page(section: str) -> None:
    catalog, examples = make_catalog(), make_examples()
    scores, aucs, sizes = Likes(catalog).score(examples), [], []
    pages = {row["page_id"]: (at, row) for at, row in reversed([*enumerate(examples.to_pylist())])}
    for at, page in pages.values():
        clicks = [
            item
            for item in page["page_positive_ids"]
            if (int(item[1:]) % 2 == 0 if section == "warm/" else item in page["history_item_ids"])
        ]
        if clicks:
            pos, neg = (
                scores[at, catalog.rows(ids)] for ids in (clicks, page["hard_negative_ids"])
            )
            aucs.append(np.mean([(p > n) + 0.5 * (p == n) for p in pos for n in neg]))
            sizes.append(len(pos) + len(neg))
    metrics = run()
    assert metrics[section + "num_gauc_groups"] == len(aucs) > 0
    assert metrics[section + "gAUC"] == pytest.approx(100 * np.average(aucs, weights=sizes))
