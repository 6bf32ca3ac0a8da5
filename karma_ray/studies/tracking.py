"""What searches and studies send to MLflow when they end, beside their runs (runs/tracking.py)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from karma_ray.artifacts import absolute
from karma_ray.config import flattened, to_dict
from karma_ray.runs.tracking import is_asked, send_result
from karma_ray.studies.ledger import Search
from karma_ray.studies.records import read_records

OF_A_SEARCH = ("report.html", "best.json", "trials.json")
OF_A_STUDY = ("report", "tables.md")


def send_search(result: Search, space: str, out: str) -> None:
    """Send the best trial's configuration, the space it was drawn from, and what was found."""
    ended = Counter(trial.ended for trial in result.trials)
    params = {
        "space": space,
        "best": result.best.name,
        **{f"drawn/{path}": told for path, told in result.distributions.items()},
        **dict(flattened(to_dict(result.config()))),
    }
    numbers = {
        **{f"trials/{how.replace(' ', '_')}": float(count) for how, count in ended.items()},
        "saved_share": result.saved_share(),
        f"best/{result.metric}": result.best.value(result.metric) or 0.0,
    }
    for one in result.measured.compared if result.measured else ():
        numbers |= {
            f"test/{one.metric}/best": one.best,
            f"test/{one.metric}/default": one.default,
            f"test/{one.metric}/difference": one.difference,
        }
    send_result(out, "search", params, numbers, OF_A_SEARCH)


def send_study(results: str | Path) -> None:
    """Send the report of all records in `results`, and how many there are of each data set."""
    if not is_asked():
        return
    counts = Counter(str(record["data"]) for record in read_records(results))
    params = {"data": ", ".join(sorted(counts))}
    numbers = {f"records/{name}": float(count) for name, count in counts.items()}
    send_result(absolute(str(results)), "study", params, numbers, OF_A_STUDY)
