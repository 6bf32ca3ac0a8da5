"""benchmarks/gpu_check.py on a CPU, where ray, polars and faiss cannot be imported."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/gpu_check.py"
PROGRAM = """
import runpy, sys
for package in ("ray", "polars", "faiss"):
    sys.modules[package] = None  # importing it raises ImportError
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def lines(*flags: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", PROGRAM, str(SCRIPT), "--device", "cpu", *flags]
    # Layers stay as they are: compiling even the tiny ones takes a minute of C++.
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Any]]]:
    parts: dict[str, list[dict[str, Any]]] = {}
    for line in lines("--parts", "equality,first_step,step,kernels,encode,compiled"):
        parts.setdefault(line["part"], []).append(line)
    return parts


def test_every_part_reports_and_the_end_stands_last(found) -> None:
    parts = ["machine", "equality", "first_step", "step", "kernels", "encode", "compiled"]
    assert list(found) == [*parts, "end"]
    assert not [line for part in found.values() for line in part if "error" in line]
    assert found["end"][0]["failed"] == []
    (machine,) = found["machine"]
    assert machine["torch"] and machine["transformers"] and machine["device"] == "cpu"
    assert min(*machine["matmul_tflops"].values(), machine["copy_gb_per_s"]) > 0


def test_the_last_line_has_the_headline_and_null_for_what_a_cpu_cannot_tell(found) -> None:
    (end,) = found["end"]
    assert end["equal"] is True
    assert end["mfu"] == found["step"][0]["mfu"]
    speeds = [line["tokens_per_s"] for line in found["encode"] if "tokens_per_s" in line]
    assert end["encode_tokens_per_s"] == max(speeds)
    assert end["seconds_to_first_step"] == found["first_step"][0]["seconds"]["whole"]
    assert end["mfu_compiled"] == found["compiled"][0]["mfu"]
    assert end["host_gap_share"] is None


def test_the_first_step_is_that_of_a_fresh_process(found) -> None:
    (line,) = found["first_step"]
    seconds = line["seconds"]
    assert list(seconds) == ["imports", "model", "step", "whole"] and min(seconds.values()) >= 0
    parts = sum(seconds[name] for name in ("imports", "model", "step"))
    assert parts == pytest.approx(seconds["whole"], abs=0.05)


def test_a_float32_step_equals_the_cpu_packed_and_padded(found) -> None:
    exact = [line for line in found["equality"] if line["precision"] == "float32"]
    assert {line["packed"] for line in found["equality"]} == {True, False}
    assert len(exact) == 2 and len(found["equality"]) == 4
    for line in exact:
        assert line["loss_difference"] < 1e-6
        assert line["relative_difference"] < 1e-5


def test_a_step_reports_its_speed_and_the_profile_its_kernels_and_waits(found) -> None:
    for line in found["step"] + found["compiled"]:
        assert line["spread"][0] <= line["seconds"] <= line["spread"][1]
        assert 0 < line["mfu"] < 1.5
        assert line["tokens_per_s"] * line["seconds"] == pytest.approx(line["tokens"], rel=0.02)
    (profile,) = found["kernels"]
    assert len(profile["top"]) == 15
    assert math.isfinite(sum(row["share"] for row in profile["top"]))
    assert profile["operators_per_step"] > 100
    assert profile["waits_per_step"]["aten::item"] > 0


def test_encoding_reports_items_and_requests(found) -> None:
    assert {line["batch_size"] for line in found["encode"] if "items_per_s" in line} == {256, 2048}
    assert {line["users"] for line in found["encode"] if "requests_per_s" in line} == {1, 64}


def test_parts_that_begin_too_late_say_that_they_were_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "_cut", lambda check: None)  # it would end this process
    flags = ["--device", "cpu", "--minutes", "0.02", "--parts", "equality,first_step"]
    assert gpu_check.main(flags) == 0
    late = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert late[0]["part"] == "machine" and late[-1]["part"] == "end"
    assert all("skipped" in line for line in late[1:-1])
    assert late[-1]["equal"] is None and late[-1]["seconds_to_first_step"] is None
