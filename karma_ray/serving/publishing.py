"""Publishing a run: checks, comparison with what is live, and the pointer.

A run is refused that is incomplete or mixed, that was measured worse than the run it replaces, or
that cannot be compared with it. The comparison is HR@50 on the same test requests.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from karma_ray.artifacts import RunFolder, absolute, exists, join, locked, read_json, read_manifest
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.retrieval.parts import delta_of, served
from karma_ray.retrieval.retriever import check_run
from karma_ray.serving.arms import FIRST, check_shares
from karma_ray.serving.live import Live, LiveRun, is_live_folder, live_file, read_live, write_live

METRIC = "HR@50"
"""What decides whether a run is worse; of the same test requests, higher is better."""
SURE = 5
"""Answers in a row with the new version that show that every replica has it."""
PAUSE_S = 0.3
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


def live_run(run: str, arm: str, now: str, share: float = 1.0) -> LiveRun:
    """Return what the pointer says of a run; raises InputError or SkewError if it cannot serve."""
    folder = served(absolute(run))
    check_run(folder)
    index = read_manifest(folder.index)["content_hash"]
    if (delta := delta_of(folder)) is not None:
        index = f"{index}+{read_manifest(delta)['content_hash']}"
    model = read_manifest(folder.bundle)["content_hash"]
    return LiveRun(arm, folder.root, dict(folder.names), model, index, now, share)


def publish(
    folder: str, run: str, *, now: str, fresh: Callable[[], str], arm: str | None = None,
    share: float | None = None, force: bool = False,
) -> tuple[Live, list[str]]:  # fmt: skip
    """Let `folder` name a run for the users of an arm; returns what is live and what was compared.

    Without `arm` the run replaces the first arm's. A new arm needs the `share` of users (0 to 1)
    that it answers. `fresh` gives random names. Raises InputError or SkewError when the run cannot
    be served, KarmaRayError when it is refused; nothing has changed then.
    """
    if exists(join(folder, "bundle")):
        raise InputError("--to", folder, "is a run; name a folder of its own for what is live")
    with locked(live_file(folder)):
        if not is_live_folder(folder):
            if arm is not None or share is not None:
                raise InputError("--arm", arm, f"needs a run that is live already in {folder}")
            live = Live((live_run(run, FIRST, now),), salt=fresh(), split=fresh())
            write_live(live, folder)
            return live, ["nothing was live, so nothing was compared"]
        live = read_live(folder)
        name = arm or live.arms[0].arm
        old = next((one for one in live.arms if one.arm == name), None)
        new = live_run(run, name, now, _share(live, name, old, share))
        notes = _compared(new, old or live.arms[0], force)
        arms = (*(new if one.arm == name else one for one in live.arms), *(() if old else (new,)))
        check_shares([one.share for one in arms[1:]])
        begins = old is None and len(live.arms) == 1
        return _replaced(live, arms, fresh() if begins else live.split, folder), notes


def end_arm(folder: str, arm: str) -> Live:
    """Let the first arm answer the users of another one."""
    with locked(live_file(folder)):
        live = read_live(folder)
        others = [one.arm for one in live.arms[1:]]
        if arm not in others:
            raise InputError("--arm", arm, "is no arm that can be ended", others)
        kept = tuple(one for one in live.arms if one.arm != arm)
        return _replaced(live, kept, live.split, folder)


def roll_back(folder: str) -> Live:
    """Exchange what is live and what was live before; raises InputError if there is nothing."""
    with locked(live_file(folder)):
        live = read_live(folder)
        if not live.previous_arms:
            raise InputError("--rollback", folder, "has no earlier publication")
        return _replaced(live, live.previous_arms, live.previous_split, folder)


def wait_until_live(endpoint: str, live: Live, within_s: float, token: str | None = None) -> None:
    """Wait until an endpoint answers with what is live; raises KarmaRayError after `within_s`."""
    wanted = [{"arm": arm.arm, **arm.version} for arm in live.arms]
    end, seen, sure = time.monotonic() + within_s, "nothing", 0
    while sure < SURE:
        try:
            found = _versions(endpoint, token)
            sure = sure + 1 if found == wanted else 0
            seen = json.dumps(found)
        except (OSError, ValueError, KeyError, TypeError, urllib.error.URLError) as error:
            sure, seen = 0, f"no version ({error})"
        if time.monotonic() > end:
            raise KarmaRayError(
                f"{endpoint} did not take over {json.dumps(wanted)} within {within_s:g} s; it "
                f"answered {seen}. It follows what its `jobs/serve.py LIVE` was started with; its "
                "log says why a publication fails. What was live there goes on answering"
            )
        if sure < SURE:
            time.sleep(PAUSE_S)


def _versions(endpoint: str, token: str | None) -> list[dict[str, str]]:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{endpoint.rstrip('/')}/v1/version", headers=headers)
    with urllib.request.urlopen(request, timeout=5) as answer:
        arms = json.load(answer)["arms"]
    return [{k: arm[k] for k in ("arm", "model_version", "index_version")} for arm in arms]


def token_of_environment() -> str | None:
    """Return the token that the endpoint asks for, if KARMA_RAY_TOKEN is set."""
    return os.environ.get("KARMA_RAY_TOKEN")


def _share(live: Live, name: str, old: LiveRun | None, share: float | None) -> float:
    """Return the share of users of an arm; raises InputError on one that makes no sense."""
    if name == live.arms[0].arm:
        if share is not None:
            raise InputError("--share", 100 * share, f"is for other arms; {name} has the rest")
        return 1.0
    if not _NAME.fullmatch(name):
        raise InputError("--arm", name, "must be a short name of a-z, 0-9, - and _")
    if share is None and old is None:
        raise InputError("--share", None, f"is needed: the percentage of users of the arm {name}")
    return old.share if share is None and old is not None else float(share or 0.0)


def _replaced(live: Live, arms: tuple[LiveRun, ...], split: str, folder: str) -> Live:
    """Write other arms, unless they say the same; what was live before stays known."""
    if [replace(arm, published_at="") for arm in arms] == [
        replace(arm, published_at="") for arm in live.arms
    ]:
        return live
    live = replace(live, arms=arms, split=split, previous_arms=live.arms, previous_split=live.split)
    write_live(live, folder)
    return live


def _compared(new: LiveRun, old: LiveRun, force: bool) -> list[str]:
    """Return what was compared; raises KarmaRayError if the new run is refused."""
    if new.model_version == old.model_version:
        return ["the same model as what is live, so nothing was compared"]
    refusal, note = comparison(new.run, old.run)
    if refusal and not force:
        raise KarmaRayError(f"{new.run} is refused: {note}; --force publishes it all the same")
    return [f"{note} (published by --force)" if refusal else note]


def comparison(run: str, live: str) -> tuple[bool, str]:
    """Return whether `run` must not replace `live`, and the reason or the figures."""
    sides = []
    for name, folder in (("it", run), ("what is live", live)):
        facts = _measured(folder)
        if METRIC not in facts:
            return True, f"{name} cannot be compared, as {folder} has no {METRIC} in metrics.json"
        sides.append(facts)
    ours, theirs = sides
    for key in ("data", "num_test"):
        if ours[key] is None or ours[key] != theirs[key]:
            return True, (
                f"it was measured on other test requests ({_of(ours)}) than what is live "
                f"({_of(theirs)}), so {METRIC} cannot be compared"
            )
    figures = (
        f"{METRIC} {ours[METRIC]:.2f} against {theirs[METRIC]:.2f} of what is live, on the same "
        f"{ours['num_test']} test requests"
    )
    worse = ours[METRIC] < theirs[METRIC]
    return worse, f"it is worse: {figures}" if worse else figures


def _measured(run: str) -> dict[str, Any]:
    """Return the metrics of a run with the content hash of its data."""
    folder = RunFolder(run)
    metrics: Mapping[str, Any] = read_json(folder.metrics) if exists(folder.metrics) else {}
    manifest = folder.path("manifest.json")
    parents = read_manifest(run).get("parents", {}) if exists(manifest) else {}
    kept = {key: metrics[key] for key in (METRIC,) if isinstance(metrics.get(key), int | float)}
    return {"data": parents.get("data"), "num_test": metrics.get("num_test"), **kept}


def _of(facts: Mapping[str, Any]) -> str:
    return f"data {facts['data']}, {facts['num_test']} requests"
