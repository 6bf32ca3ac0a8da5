"""The job gives codes to a run's items, in this process and on Ray, and refuses what is wrong."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from karma_ray.artifacts import read_manifest, read_table
from karma_ray.cluster.codes import code_items
from karma_ray.codes.config import CodesConfig
from karma_ray.codes.table import load_codes
from karma_ray.errors import InputError
from tests import aligned_run
from tests.codes.test_table import embeddings

JOB: Any = runpy.run_path(str(Path(__file__).parents[2] / "jobs/codes.py"))["main"]
SMALL = ("--set", "codes.codewords=8", "--set", "codes.fsq_levels=[4, 4]")


@pytest.fixture
def run(tmp_path: Path) -> str:
    embeddings(tmp_path / "run" / "item_embeddings")
    return str(tmp_path / "run")


def test_the_job_writes_the_table_of_a_run_and_says_how_good_it_is(run: str, capsys) -> None:
    JOB([run, *SMALL, "--kind", "rq_kmeans"])
    said = capsys.readouterr().out
    facts = read_manifest(f"{run}/item_codes", "item_codes")
    assert facts["config"]["kind"] == "rq_kmeans" and facts["sizes"] == [8, 8, 16]
    assert "300 items with codes 8 x 8 x 16 of kind rq_kmeans" in said
    assert f"{facts['collision_rate']:.4f}" in said and f"-> {run}/item_codes" in said
    source = read_manifest(f"{run}/item_embeddings")["content_hash"]
    assert len(load_codes(f"{run}/item_codes", source).item_ids) == 300


def test_codebooks_of_an_earlier_day_are_used_again(run: str, tmp_path: Path, capsys) -> None:
    JOB([run, *SMALL])
    JOB([run, "--out", str(tmp_path / "new"), "--codebooks", f"{run}/item_codes"])
    assert read_table(str(tmp_path / "new")).equals(read_table(f"{run}/item_codes"))


def test_both_kinds_are_compared_and_nothing_is_written(run: str, capsys) -> None:
    JOB([run, *SMALL, "--compare", "--seeds", "2"])
    said = capsys.readouterr().out
    assert "res_kmeans_fsq" in said and "rq_kmeans" in said and "2 seeds" in said
    assert not Path(run, "item_codes").exists()


def test_ids_are_made_of_the_embeddings_of_a_tuned_llm(tmp_path: Path, capsys) -> None:
    run = aligned_run.write_run(tmp_path)
    JOB(
        [run, "--aligned", "llm", "--set", "align.steps=2", "--set", "align.relevance=0.05", *SMALL]
    )
    said = capsys.readouterr().out
    assert "aligned by llm" in said and "related by their texts" in said
    assert "one item's text from the other's summary" in said
    source = read_manifest(f"{run}/aligned_embeddings")["content_hash"]
    assert len(load_codes(f"{run}/item_codes-aligned", source).item_ids) == 160


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--set", "codes.level=3"], "'codes.level' is not a known field; choices: codes.kind"),
        (["--set", "codes.levels=0"], "codes.levels: 0 should be greater than or equal to 1"),
        (["--set", "codes.levels"], "not of the form"),
        (["--codebooks", "x", "--kind", "rq_kmeans"], "goes with no --kind"),
        (["--seeds", "3"], "for --compare"),
        (["--out", "x", "--compare"], "not written by --compare"),
        (["--actors", "0", *SMALL], "must be at least 1"),
        (["--aligned", "tree"], "--aligned: 'tree' is not valid; choices: projection, llm"),
        (["--set", "align.steps=3"], "has fields of --aligned"),
        (["--aligned", "--set", "align.summary_tokens=3"], "not a known field"),
        (["--set", "codes.codewords=301"], "there are 300"),
    ],
)
def test_what_does_not_fit_is_refused(run: str, flags: list[str], said: str) -> None:
    with pytest.raises(InputError) as error:
        JOB([run, *flags])
    assert said in str(error.value)


@pytest.mark.ray
def test_workers_write_the_table_of_one_process(
    ray_cluster: None, run: str, tmp_path: Path
) -> None:
    config = CodesConfig(codewords=8, fsq_levels=(4, 4), iterations=10)
    source = f"{run}/item_embeddings"
    here = code_items(source, str(tmp_path / "here"), config)
    there = code_items(source, str(tmp_path / "there"), config, num_actors=2, part_items=70)
    assert read_table(str(tmp_path / "there")).equals(read_table(str(tmp_path / "here")))
    assert there["collision_rate"] == here["collision_rate"]
    assert len(list((tmp_path / "there").glob("*.parquet"))) == 5
