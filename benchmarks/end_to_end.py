"""Where the time and memory of a whole training run go, stage by stage, on a generated log.

    python benchmarks/end_to_end.py [--items 100000] [--events 1000000] [--set PATH=VALUE] [--quick]

A log of page views is drawn (items of 200 categories with popularity by rank, users with a few
favourite categories, two clicks a page), then `karma_ray.runs` makes a run of it in this process,
as `python -m karma_ray.runs` does, in a temporary folder. A thread looks 20 times a second at what
is being computed: JSON lines, one for each stage with its seconds, CPU seconds of the process, the
peak of the memory that is its own (`anonymous_gib`; mapped files are shared), and the functions of
the package that it was in most often, then a line with the totals and the median share of joint
training's time that waits for batches. Test examples and steps are few (SHORT), since shapes and
batches decide what a step takes; --set changes that. --quick checks the command on a small log.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa

from benchmarks.lookup import anonymous_gib
from karma_ray import cli
from karma_ray.artifacts import RunFolder, join, read_lines, write_manifest, write_table
from karma_ray.data.schema import TIME
from karma_ray.runs.pipeline import train_run

SHORT = (
    "pretrain.steps=100", "warmup.steps=100", "training.steps=100", "training.num_workers=0",
    "training.threads_per_worker=1", "evaluation.max_examples=1000",
)  # fmt: skip
QUICK = ("pretrain.steps=5", "warmup.steps=5", "training.steps=5", "evaluation.max_examples=20")
STAGES = {
    ("runs/preparation.py", "_prepare_into"): "prepare",
    ("runs/pretraining.py", "_pretrain"): "pretrain",
    ("runs/warm_up.py", "_warm_up"): "warm-up",
    ("runs/stages.py", "Stage.fit_to_items"): "fit to the items",
    ("runs/pipeline.py", "_train"): "joint training",
    ("runs/joint.py", "Validation.__call__"): "validation",
    ("runs/pipeline.py", "_serve_side"): "embeddings and index",
    ("runs/assessment.py", "assess"): "test of the run",
    ("runs/floor_metrics.py", "FloorFile.measured"): "floors",
    ("runs/assessment.py", "run_checks"): "checks",
    ("evaluation/cases.py", "collect_cases"): "cases",
    ("runs/forgetting.py", "forgetting"): "forgetting",
    ("report/page.py", "render_report"): "report",
    ("data/catalog.py", "_write_arrow"): "copy of the catalogue",
    ("data/catalog.py", "Catalog._contents"): "content ids",
    ("data/item_lookup.py", "ItemLookup.__init__"): "lookup table",
    ("data/tokens.py", "catalog_tokens"): "tokens",
}
"""Functions of the package by stage; of those that are running, the innermost names the stage."""
PERIOD = 0.05
CATEGORIES, PAGE, CLICKS_A_PAGE, PAGES_A_USER = 200, 10, 2, 20


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = cli.parser(__doc__ or "", config=True)
    flags.add_argument("--items", type=int, default=100_000, help="items (100000)")
    flags.add_argument("--events", type=int, default=1_000_000, help="clicks (1000000)")
    flags.add_argument("--quick", action="store_true", help="500 items, 5,000 clicks, 5 steps")
    arguments = flags.parse_args(argv)
    items, events = (500, 5_000) if arguments.quick else (arguments.items, arguments.events)
    short = [*SHORT, *(QUICK if arguments.quick else ())]
    arguments.assignments = [*short, *arguments.assignments]
    config = cli.load_config(arguments, "karma_text")
    with tempfile.TemporaryDirectory() as folder:
        data = join(folder, "data")
        write_log(data, items, events)
        try:
            with Watch() as watch:
                train_run(config, data, join(folder, "run"), cache=join(folder, "cache"))
        finally:  # what was measured before an interruption
            for line in watch.lines():
                print(json.dumps(line), flush=True)
        waits = [
            line["data_wait_share"]
            for line in read_lines(RunFolder(join(folder, "run")).metrics_lines)
            if line["stage"] == "joint" and "data_wait_share" in line
        ]
    print(json.dumps({
        "part": "total", "items": items, "clicks": events, "recipe": config.recipe,
        "steps": config.training.steps, "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "data_wait_share": statistics.median(waits), **watch.totals(),
    }))  # fmt: skip


def write_log(uri: str, num_items: int, num_clicks: int) -> None:
    """Write items and page views, of which the users clicked CLICKS_A_PAGE items each."""
    random = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(5_000)])
    brands = np.array([f"brand{number}" for number in range(300)])
    names = np.array([f"kind {number}" for number in range(CATEGORIES)])
    category = random.integers(0, CATEGORIES, num_items)
    drawn = words[(len(words) * random.random((num_items, 6)) ** 2).astype(int)]
    ids = np.char.add("item", np.arange(num_items).astype(str))
    title = [f"{name} {' '.join(some)}" for name, some in zip(names[category], drawn, strict=True)]
    brand = brands[random.integers(0, len(brands), num_items)]
    items = {"item_id": ids, "title": title, "brand": brand, "category": names[category]}
    write_table(pa.table(items), join(uri, "items"))
    num_pages = -(-num_clicks // CLICKS_A_PAGE)
    user = np.arange(num_pages) // PAGES_A_USER
    favourites = random.integers(0, CATEGORIES, (user[-1] + 1, 3))
    wanted = favourites[user, random.integers(0, 3, num_pages)]
    order = np.argsort(category, kind="stable")
    first = np.searchsorted(category[order], np.arange(CATEGORIES + 1))
    size = np.diff(first)[wanted]
    rank = (size[:, None] * random.random((num_pages, PAGE)) ** 3).astype(int)
    shown = order[first[wanted][:, None] + rank]
    seconds = np.sort(random.integers(0, 60 * 86_400, num_pages))
    start = np.datetime64("2026-01-01T00:00:00", "us")
    events = {
        "user_id": np.char.add("user", user.astype(str)),
        "timestamp": pa.array(start + seconds.astype("timedelta64[s]")).cast(TIME),
        "query": names[wanted],
        "exposed_item_ids": _lists(ids, shown),
        "clicked_item_ids": _lists(ids, shown[:, :CLICKS_A_PAGE]),
    }
    write_table(pa.table(events), join(uri, "events"))
    write_manifest(uri, "data", name="generated", notes=["a generated log, for its size"])


def _lists(ids: np.ndarray, rows: np.ndarray) -> pa.ListArray:
    ends = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(ids).take(pa.array(rows.ravel())))


@dataclass
class Spent:
    """What a stage took."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    anonymous_gib: float = 0.0
    functions: Counter[str] = field(default_factory=Counter)


class Watch:
    """Looks at the main thread from another, and adds up what each stage takes."""

    def __init__(self) -> None:
        self._spent: dict[str, Spent] = defaultdict(Spent)
        self._done = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def lines(self) -> list[dict[str, Any]]:
        """Return a line for each stage, in the order of their first appearance."""
        return [
            {
                "part": "stage",
                "stage": name,
                **_rounded(spent),
                "most_in": [
                    [function, round(count / spent.functions.total(), 2)]
                    for function, count in spent.functions.most_common(3)
                ],
            }
            for name, spent in self._spent.items()
        ]

    def totals(self) -> dict[str, float]:
        """Return the sums and the largest peak."""
        every = self._spent.values()
        return _rounded(
            Spent(
                sum(spent.seconds for spent in every),
                sum(spent.cpu_seconds for spent in every),
                max((spent.anonymous_gib for spent in every), default=0.0),
            )
        )

    def _look(self) -> None:
        before = time.perf_counter(), time.process_time()
        while not self._done.wait(PERIOD):
            frame = sys._current_frames().get(self._main or 0)
            now = time.perf_counter(), time.process_time()
            stage, function = _place(frame)
            spent = self._spent[stage]
            spent.seconds += now[0] - before[0]
            spent.cpu_seconds += now[1] - before[1]
            spent.anonymous_gib = max(spent.anonymous_gib, anonymous_gib())
            spent.functions[function] += 1
            before = now


def _place(frame: FrameType | None) -> tuple[str, str]:
    """Return the stage, and the innermost function of the package."""
    stage, function = "", ""
    while frame is not None:
        code = frame.f_code
        _, found, path = code.co_filename.rpartition("/karma_ray/")
        if found:
            function = function or f"{path}:{code.co_qualname}"
            stage = stage or STAGES.get((path, code.co_qualname), "")
        frame = frame.f_back
    return stage or "other", function


def _rounded(spent: Spent) -> dict[str, float]:
    return {
        "seconds": round(spent.seconds, 1),
        "cpu_seconds": round(spent.cpu_seconds, 1),
        "anonymous_gib": round(spent.anonymous_gib, 2),
    }


if __name__ == "__main__":
    cli.run(main)
