"""`python -m karma_ray.runs` from tables to a run folder where ray and faiss cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from karma_ray.artifacts import read_json
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from tests.runs.test_pipeline import SMALL

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
for package in ("ray", "faiss"):
    sys.modules[package] = None  # importing it raises ImportError
runpy.run_module("karma_ray.runs", run_name="__main__", alter_sys=True)
"""


def test_a_run_from_tables_to_a_run_folder_needs_neither_ray_nor_faiss(tmp_path: Path) -> None:
    shop = str(tmp_path / "shop")
    write_toy_shop(shop, ToyShopConfig(num_items=240, num_users=120))
    settings = [part for line in SMALL for part in ("--set", line)]
    flags = ["--data", shop, "--recipe", "toy", "--out", "made", *settings]
    command = [sys.executable, "-c", PROGRAM, str(ROOT), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 0 <= read_json(str(tmp_path / "made/metrics.json"))["HR@10"] <= 100
    for part in ("bundle/manifest.json", "index/vectors.npy", "report/report.html"):
        assert (tmp_path / "made" / part).exists(), part
