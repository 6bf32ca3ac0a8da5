"""How far a search or a study has come, as sentences: what its folder alone can say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from karma_ray import recipes
from karma_ray.artifacts import RunFolder, exists, join, read_json, write_json
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.report.progress import hours_sentence, progress_sentences, score_of
from karma_ray.studies.ledger import Ledger, best_of, shown
from karma_ray.studies.records import read_records

STUDY = "study.json"
"""File in the folder of a study's runs: the folders of the runs that it has to make."""


def note_study(runs: str, folders: Sequence[str]) -> None:
    """Write down what a study has to make, in the folder of its runs."""
    write_json({"runs": list(folders)}, join(runs, STUDY))


def told_progress(folder: str, hours: Mapping[str, float]) -> list[str]:
    """Return what a run, a search or a study has done and used.

    A study has two folders, that of its runs and that of its records. `hours` are those of the
    machines, by kind. Raises InputError for any other folder.
    """
    if exists(RunFolder(folder).config):
        return progress_sentences(folder, hours)
    if exists(join(folder, "search.json")):
        told = _of_search(folder)
    elif exists(join(folder, STUDY)):
        told = _of_runs(folder)
    elif exists(folder) and read_records(folder):
        told = _of_records(folder)
    else:
        problem = (
            "is no run, search or study: it has no config.json, search.json, study.json or records"
        )
        raise InputError("RUN", folder, problem)
    return [*told, hours_sentence(hours)]


def _of_search(out: str) -> list[str]:
    facts, trials = read_json(join(out, "search.json")), Ledger(out).trials()
    metric, asked = facts["metric"], facts.get("trials")
    ended = [trial for trial in trials if trial.ended != "unfinished"]
    counts = Counter(trial.ended for trial in ended)
    how = "".join(f", {count} {end}" for end, count in sorted(counts.items()))
    of = f" of {asked}" if asked else ""
    waiting = f", {asked - len(trials)} waiting" if asked and asked > len(trials) else ""
    told = [
        f"{out}: a search of {metric}; {len(ended)}{of} trials ended{how}; "
        f"{len(trials) - len(ended)} begun{waiting}."
    ]
    try:
        best = best_of(ended, metric) if ended else None
    except KarmaRayError:  # all have failed so far
        best = None
    if best is None:
        return [*told, "No trial has a value yet."]
    values = ", ".join(f"{path}={shown(value)}" for path, value in best.values.items())
    return [*told, f"Best: trial {best.name}, {metric} {best.value(metric):.2f} with {values}."]


def _of_runs(folder: str) -> list[str]:
    runs = read_json(join(folder, STUDY))["runs"]
    begun = [run for run in runs if exists(RunFolder(run).config)]
    finished = {run: read_json(RunFolder(run).metrics) for run in begun
                if exists(RunFolder(run).metrics)}  # fmt: skip
    told = (
        f"{folder}: a study of {len(runs)} runs; {len(finished)} finished, "
        f"{len(begun) - len(finished)} begun, {len(runs) - len(begun)} waiting."
    )
    found = [
        (run.rsplit("/", 1)[-1], metrics)
        for run, metrics in finished.items()
        if _is_trained(read_json(RunFolder(run).config)["recipe"])
    ]
    return [told, *_best(found)]


def _of_records(folder: str) -> list[str]:
    records, told = read_records(folder), []
    for data in sorted({record["data"] for record in records}):
        its = [record for record in records if record["data"] == data]
        rows = {record.get("row") for record in its}
        told.append(f"{folder}: {len(its)} records of {len(rows)} rows on {data}.")
        told += _best([(r["name"], r["metrics"]) for r in its if _is_trained(r["recipe"])])
    return told


def _best(found: Sequence[tuple[str, Mapping[str, float]]]) -> list[str]:
    """Return the sentence on the best of named metrics, if any has a headline."""
    scores = [(*score, name) for name, metrics in found if (score := score_of(metrics))]
    return [f"Best: {said} ({name})." for _, said, name in [max(scores)]] if scores else []


def _is_trained(recipe: str) -> bool:
    return recipe in recipes.TRAINED or recipe in recipes.RANKERS
