"""The pointer names runs that can serve and are no worse, or stays as it was."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from karma_ray.artifacts import join, write_json, write_manifest
from karma_ray.errors import InputError, KarmaRayError, SkewError
from karma_ray.retrieval.index_build import index_run
from karma_ray.serving.live import Live, check_source, is_live_folder, live_file, read_live
from karma_ray.serving.publishing import comparison, end_arm, publish, roll_back
from tests import tiny_run


def names() -> Iterator[str]:
    return (f"name{n}" for n in itertools.count())


def measured_run(root: Path, seed: int, hr: float, data: str = "shop", count: int = 300) -> str:
    """A finished run that was measured."""
    root.mkdir(exist_ok=True)
    run = tiny_run.write_run(root, seed)
    write_manifest(run, "run", parents={"data": data}, data=str(root / "data"))
    write_json({"HR@50": hr, "num_test": count}, join(run, "metrics.json"))
    return run


def measured_again(run: str, hr: float, data: str = "shop", count: int = 300) -> str:
    write_manifest(run, "run", parents={"data": data})
    write_json({"HR@50": hr, "num_test": count}, join(run, "metrics.json"))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("runs")
    return [measured_run(root / str(seed), seed, 40.0) for seed in range(2)]


@pytest.fixture
def let(tmp_path: Path) -> Callable[..., tuple[Live, list[str]]]:
    fresh = names()

    def do(run: str, **options) -> tuple[Live, list[str]]:
        return publish(str(tmp_path / "live"), run, now="now", fresh=lambda: next(fresh), **options)

    return do


def folder_of(tmp_path: Path) -> str:
    return str(tmp_path / "live")


def test_a_published_run_is_named_with_its_versions(runs, let, tmp_path: Path) -> None:
    live, _ = let(runs[0])
    assert is_live_folder(folder_of(tmp_path)) and read_live(folder_of(tmp_path)) == live
    (arm,) = live.arms
    for part, version in (("bundle", arm.model_version), ("index", arm.index_version)):
        assert (
            json.loads(Path(arm.run, part, "manifest.json").read_text())["content_hash"] == version
        )
    assert check_source(folder_of(tmp_path)).root == runs[0]


def test_a_worse_run_is_refused_with_the_figures_unless_forced(runs, let, tmp_path: Path) -> None:
    let(measured_again(runs[0], 40.0))
    before = Path(live_file(folder_of(tmp_path))).read_text()
    measured_again(runs[1], 39.5)
    with pytest.raises(KarmaRayError, match=r"39\.50 against 40\.00 .* 300 test requests.*--force"):
        let(runs[1])
    assert Path(live_file(folder_of(tmp_path))).read_text() == before
    live, notes = let(runs[1], force=True)
    assert live.arms[0].run == runs[1] and "--force" in notes[0]
    measured_again(runs[0], 39.5)
    assert let(runs[0])[0].arms[0].run == runs[0]


@pytest.mark.parametrize(
    ("data", "count", "why"),
    [("another shop", 300, "other test requests"), ("shop", 200, "200 requests")],
)
def test_runs_of_other_data_cannot_be_compared(runs, let, data: str, count: int, why: str) -> None:
    let(measured_again(runs[0], 40.0))
    measured_again(runs[1], 99.0, data, count)
    with pytest.raises(KarmaRayError, match=why):
        let(runs[1])
    assert let(runs[1], force=True)[0].arms[0].run == runs[1]


def test_a_run_that_was_not_measured_cannot_be_compared(runs, tmp_path: Path) -> None:
    assert comparison(str(tmp_path), runs[0]) == (
        True, f"it cannot be compared, as {tmp_path} has no HR@50 in metrics.json",
    )  # fmt: skip


def test_the_same_model_with_another_index_needs_no_comparison(tmp_path: Path, let) -> None:
    run = measured_run(tmp_path / "again", 3, 40.0)
    first = let(run)[0].arms[0]
    index_run(run)
    Path(run, "metrics.json").unlink()
    second = let(run)[0].arms[0]
    assert first.model_version == second.model_version and first.parts != second.parts


def test_a_mixed_or_unfinished_run_is_refused(tmp_path: Path, let) -> None:
    run = measured_run(tmp_path / "mixed", 4, 40.0)
    manifest = Path(run, "index", "manifest.json")
    kept = manifest.read_text()
    manifest.write_text(kept.replace('"bundle": "', '"bundle": "other'))
    with pytest.raises(SkewError):
        let(run)
    manifest.unlink()
    with pytest.raises(InputError, match=r"jobs/index\.py"):
        let(run)
    assert not is_live_folder(folder_of(tmp_path))
    with pytest.raises(InputError, match="is a run"):
        publish(run, run, now="", fresh=str)


def test_a_rollback_returns_and_can_be_undone(runs, let, tmp_path: Path) -> None:
    first, _ = let(measured_again(runs[0], 40.0))
    with pytest.raises(InputError, match="no earlier"):
        roll_back(folder_of(tmp_path))
    second, _ = let(measured_again(runs[1], 41.0))
    again, _ = let(runs[1])  # what is said twice is not forgotten in between
    assert again == second
    assert roll_back(folder_of(tmp_path)).arms == first.arms
    assert roll_back(folder_of(tmp_path)).arms == second.arms


def test_an_arm_begins_with_a_share_changes_and_ends(runs, let, tmp_path: Path) -> None:
    alone, _ = let(measured_again(runs[0], 40.0))
    measured_again(runs[1], 41.0)
    with pytest.raises(InputError, match="--share is needed"):
        let(runs[1], arm="new")
    with pytest.raises(InputError, match="short name"):
        let(runs[1], arm="A b", share=0.1)
    with pytest.raises(InputError, match="has the rest"):
        let(runs[1], share=0.1)
    both, _ = let(runs[1], arm="new", share=0.1)
    assert [(arm.arm, arm.run) for arm in both.arms] == [("main", runs[0]), ("new", runs[1])]
    assert both.split != alone.split and both.salt == alone.salt
    more, _ = let(runs[1], arm="new", share=0.5)
    assert more.split == both.split and more.arms[1].share == 0.5
    kept, _ = let(runs[0], arm="new", force=True)
    assert kept.arms[1] == replace(more.arms[1], run=runs[0], parts=kept.arms[1].parts,
                                   model_version=alone.arms[0].model_version,
                                   index_version=alone.arms[0].index_version)  # fmt: skip
    with pytest.raises(InputError, match="choices: new"):
        end_arm(folder_of(tmp_path), "main")
    assert end_arm(folder_of(tmp_path), "new").arms == alone.arms


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"arms": [], "previous_arms": []}'])
def test_a_damaged_pointer_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "live.json").write_text(text)
    with pytest.raises(InputError, match=r"damaged live\.json"):
        read_live(str(tmp_path))
