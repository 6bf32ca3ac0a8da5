"""A log with true impressions, in KuaiSearch's layout: a CTR model and all three stages.

The demo has title rows for two of its 25,430 impressions, so nothing can be trained on it as it is.
Here each shown item of the first places of a page is given one of its real titles; pages, queries,
times, impressions and clicks are the demo's own.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from karma_ray.artifacts import read_json
from karma_ray.config import override
from karma_ray.data.config import PrepareConfig
from karma_ray.data.importers.kuaisearch import import_kuaisearch
from karma_ray.errors import InputError
from karma_ray.funnel.measure import measure_funnel
from karma_ray.recipes import build
from karma_ray.runs.pipeline import train_run
from karma_ray.runs.preparation import ensure_prepared
from tests.funnel.conftest import WriteRun

PLACES = 8
SMALL = (
    "ranking.width=4", "ranking.hidden=8", "ranking.attention_hidden=4", "ranking.epochs=0",
    "training.num_workers=0", "training.batch_size=8", "training.steps=4",
    "training.validate_every=0",
)  # fmt: skip


def titled(demo: Path, folder: Path) -> str:
    """Write the demo's pages beside title rows of every clicked item and of the first places."""
    pages = (demo / "recall.jsonl").read_text()
    rows = [json.loads(line) for line in (demo / "items.jsonl").read_text().splitlines()]
    shown: dict[int, None] = {}
    for page in map(json.loads, pages.splitlines()):
        shown |= dict.fromkeys(page["impressed_item_ids"][:PLACES] + page["clicked_item_ids"])
    items = [rows[place % len(rows)] | {"item_id": item} for place, item in enumerate(shown)]
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    (folder / "items.jsonl").write_text("\n".join(lines))
    (folder / "recall.jsonl").write_text(pages)
    return str(folder)


def test_true_impressions_give_a_ctr_model_and_every_stage_without_labels(
    shared_data: Path, write_run: WriteRun, tmp_path: Path
) -> None:
    demo, data, cache = shared_data / "kuaisearch_demo", str(tmp_path / "data"), str(tmp_path / "c")
    (tmp_path / "log").mkdir()
    manifest = import_kuaisearch(titled(demo, tmp_path / "log"), data)
    assert manifest["negative_source"] == "exposed" and manifest["counts"]["clicks"] > 500
    source = ensure_prepared(data, PrepareConfig())
    run = write_run(tmp_path / "run", source)
    measure_funnel([run], out=str(tmp_path / "out"), cache=cache, ctr=SMALL)
    found = read_json(str(tmp_path / "out" / "funnel.json"))
    assert found["labels"] == [] and found["negative_source"] == "exposed"
    for name in ("recall/delta_none", "prerank/delta_none", "ranking/AUC", "ranking/AUC/none"):
        assert np.isfinite(found[name]), name


def test_the_demo_as_it_is_has_nothing_to_learn_from(shared_data: Path, tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    import_kuaisearch(str(shared_data / "kuaisearch_demo"), data)
    config = override(build("ctr_din"), SMALL)
    with pytest.raises(InputError):
        train_run(config, data, str(tmp_path / "run"), cache=str(tmp_path / "cache"))
