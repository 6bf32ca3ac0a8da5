"""The benchmark that sets what serves beside each other tells a difference from none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bundles import main
from karma_ray.errors import InputError
from tests import generating, tiny_run


def headline(capsys: pytest.CaptureFixture[str], *runs: str) -> dict[str, Any]:
    main([*runs, "--rounds", "1", "--requests", "3"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(runs) + 1
    found: dict[str, Any] = lines[-1]
    return found


def test_runs_of_one_shape_have_the_same_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [tiny_run.write_run(tmp_path / name, seed) for seed, name in enumerate("ab")]
    found = headline(capsys, *runs)
    assert found["same_tensors"] and found["largest_bytes_over_first"] == pytest.approx(1, abs=1e-3)
    assert found["slowest_over_first"] > 0 and found["again_over_first"] > 0


def test_a_bundle_with_more_in_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = generating.add_generator(tiny_run.interest_model(tiny_run.tokenizer()), kind="mse")
    plain = tiny_run.write_run(tmp_path / "plain")
    found = headline(capsys, plain, tiny_run.write_run(tmp_path / "more", interest=more.eval()))
    assert not found["same_tensors"] and found["largest_bytes_over_first"] > 1.1


def test_one_run_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least two"):
        main([tiny_run.write_run(tmp_path)])
