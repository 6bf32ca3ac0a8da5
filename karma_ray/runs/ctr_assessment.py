"""Evaluation of a CTR model on validation and test pages, beside its floors and its ceiling."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import pyarrow as pa

from karma_ray.artifacts import RunFolder, exists, join, read_json, value_hash, write_json
from karma_ray.config import Config
from karma_ray.data.catalog import Catalog
from karma_ray.data.prepared import PreparedData
from karma_ray.data.steps import flattened, list_sizes
from karma_ray.metrics.clicks import Reliability
from karma_ray.model.device import this_device
from karma_ray.ranking.exposures import Exposures, requests_of
from karma_ray.ranking.floors import ItemRates
from karma_ray.ranking.judged import Judged, Predict
from karma_ray.ranking.load import KIND, Ranker, load_ranker
from karma_ray.runs.ctr import exposures_of, predictor, teacher_of

LOG = logging.getLogger(__name__)
VERSION = 1
"""Raised when floors are measured in another way."""
GLOBAL, ITEM, ORACLE = "global_ctr", "item_ctr", "oracle"


def assess_ctr(
    config: Config, source: PreparedData, run: str, cache: str, out: str | None = None
) -> dict[str, Any]:
    """Evaluate the ranker of a run; writes floors.json, checks.json, reliability.json and
    predictions/ into `out` (default: the run folder). Returns the content of metrics.json."""
    folder, weight = RunFolder(out or run), config.evaluation.gauc_weight
    catalog, exposures = source.catalog(), exposures_of(config, source, cache)
    ranker = load_ranker(run, this_device())
    predict = predictor(ranker.model, ranker.collator, _row_of(ranker, exposures, catalog))
    LOG.info("evaluating %d test pages", exposures.num_pages("test"))
    test, valid = (Judged.of(exposures, split, predict) for split in ("test", "valid"))
    rates = ItemRates.count(exposures, catalog.num_items).fitted(valid)
    metrics = test.metrics(weight) | test.intervals(weight, config.seed)
    metrics |= ranker.manifest["notes"]
    warm = rates.is_warm[test.row] if len(test.row) else np.zeros(0, bool)
    for name, kept in (("warm", warm), ("cold", ~warm)):
        if kept.any():
            found = test.where(kept).metrics(weight)
            metrics |= {f"{name}/{key}": value for key, value in found.items()}
    metrics |= {f"valid/{key}": value for key, value in valid.metrics(weight).items()}
    for split, judged in (("test", test), ("valid", valid)):
        judged.save(folder.path("predictions"), split)
    by_items = test.with_chance(rates.rates[test.row])
    metrics |= teacher_metrics(config, source, exposures, cache)
    write_json(_floors(config, source, exposures, rates, test, valid, cache),
               folder.path("floors.json"))  # fmt: skip
    write_json(_versus(test, by_items, config), folder.path("checks.json"))
    curve = Reliability.of(test.chance, test.clicked)
    write_json(
        {name: getattr(curve, name).tolist() for name in ("predicted", "observed", "count")},
        folder.path("reliability.json"),
    )
    return metrics


def _row_of(ranker: Ranker, exposures: Exposures, catalog: Catalog) -> np.ndarray | None:
    """Return the ranker's row of every item of another catalogue; None if it is the same one."""
    if ranker.manifest["parents"]["items"] == exposures.facts["parents"]["items"]:
        return None
    return np.append(ranker.rows(catalog.item_ids), -1)


def _versus(test: Judged, by_items: Judged, config: Config) -> dict[str, Any]:
    """Compare the model with the rates of items, over users."""
    if not test.clicked.any() or test.clicked.all():
        return {}
    weight, seed = config.evaluation.gauc_weight, config.seed
    found = test.differences(by_items, weight, seed)
    return {"versus": {ITEM: {name: asdict(result) for name, result in found.items()}}}


def _floors(
    config: Config, source: PreparedData, exposures: Exposures, rates: ItemRates, test: Judged,
    valid: Judged, cache: str,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Return the metrics of the floors, and of the ceiling where the truth is known."""
    weight = config.evaluation.gauc_weight
    found = {}
    for name, of_item in ((GLOBAL, np.full(len(rates.shown), rates.common)), (ITEM, rates.rates)):
        found[name] = _both(
            test.with_chance(of_item[test.row]), valid.with_chance(of_item[valid.row]), config
        )
    if exists(join(source.items_uri, "truth")):
        key = [VERSION, exposures.facts["counts"], exposures.facts["parents"]["items"],
               source.facts.get("input"), exposures.facts["max_history"], weight]  # fmt: skip
        path = join(cache, f"ctr-ceiling-{value_hash(key)}.json")
        if not exists(path):
            LOG.info("ceiling %s", ORACLE)
            predict = _oracle(source)
            ranked = [Judged.of(exposures, split, predict) for split in ("test", "valid")]
            write_json(_both(ranked[0], ranked[1], config, is_chance=False), path)
        found[ORACLE] = cast(dict[str, float], read_json(path))
    return found


def teacher_metrics(
    config: Config, source: PreparedData, exposures: Exposures, cache: str
) -> dict[str, float]:
    """Return the metrics of the teacher, which reads what comes after the page: a bound.

    Empty for a run without one, and where it is not in the cache.
    """
    teacher = teacher_of(config, source, cache)
    if teacher is None or not exists(join(teacher[1], KIND, "manifest.json")):
        return {}  # trained on other data, so there is no teacher for these pages
    ranker = load_ranker(teacher[1], this_device())
    predict = predictor(ranker.model, ranker.collator)
    test, valid = (Judged.of(exposures, split, predict) for split in ("test", "valid"))
    return {f"teacher/{name}": value for name, value in _both(test, valid, config).items()}


def _both(test: Judged, valid: Judged, config: Config, is_chance: bool = True) -> dict[str, float]:
    weight = config.evaluation.gauc_weight
    of_valid = valid.metrics(weight, is_chance=is_chance)
    return test.metrics(weight, is_chance=is_chance) | {
        f"valid/{name}": value for name, value in of_valid.items()
    }


def _oracle(source: PreparedData) -> Predict:
    """Return the best score of a shown item from query and history, by the shop's own rules."""
    from karma_ray.baselines.oracle import PosteriorOracle

    catalog = source.catalog()
    oracle, ids = PosteriorOracle.load(source.items_uri, catalog), pa.array(catalog.item_ids)

    def predict(rows: pa.Table) -> np.ndarray:
        scores = oracle.score(requests_of(rows, ids))
        sizes = list_sizes(rows.column("candidate_rows"))
        items = flattened(rows.column("candidate_rows")).to_numpy()
        chosen: np.ndarray = scores[np.repeat(np.arange(len(sizes)), sizes), items]
        return chosen

    return predict
