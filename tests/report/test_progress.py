from __future__ import annotations

from pathlib import Path

import pytest

from karma_ray.artifacts import write_json, write_lines
from karma_ray.errors import InputError
from karma_ray.report.progress import progress_sentences


def test_a_run_says_how_far_it_has_come_and_what_it_used(tmp_path: Path) -> None:
    run = str(tmp_path)
    write_json({"training": {"steps": 1600}}, f"{run}/config.json")
    assert progress_sentences(run, {})[0] == f"{run}: not finished; no step is logged yet."
    write_lines(
        [{"stage": "joint", "step": 1200}, {"stage": "valid", "of": "joint", "step": 1200}],
        f"{run}/metrics.jsonl",
    )
    assert progress_sentences(run, {"head": 1.5, "8 CPU, 1 GPU (A10G)": 5.25}) == [
        f"{run}: not finished; the stage joint is at step 1,200 of 1,600.",
        "Machine hours so far: 5.25 x 8 CPU, 1 GPU (A10G); 1.50 x head.",
    ]
    write_json({"HR@50": 41.25, "seconds": 5400.0}, f"{run}/metrics.json")
    assert progress_sentences(run, {})[0] == f"{run}: finished, HR@50 41.2; 5,400 seconds."


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no run folder: it has no config\.json"):
        progress_sentences(str(tmp_path), {})
