"""Whole jobs on two machines that share no disk, with an S3 store between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from karma_ray import recipes
from karma_ray.artifacts import join, read_json, read_lines, read_manifest
from karma_ray.config import override
from karma_ray.data.config import PrepareConfig
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.data.visual import features_uri
from karma_ray.node_cache import upload
from karma_ray.runs.first_stages import start_stage
from karma_ray.runs.preparation import ensure_prepared
from tests.cluster import nodes
from tests.cluster.stores import BUCKET, running_store
from tests.runs.test_pipeline import SMALL

DATA, RUN = f"s3://{BUCKET}/shop", f"s3://{BUCKET}/runs/first"
FIELDS = [*SMALL, "training.precision=float32", "training.validate_every=6"]

Job = Callable[..., None]
"""(machine, words of a command): runs a job on the disk of a machine, 0 or 1."""


def _fill_store(folder: Path) -> None:
    """Raw logs, and a cache that a third machine has put its first stages into."""
    write_toy_shop(str(folder), ToyShopConfig(num_items=240, num_users=120))
    upload(folder, DATA)
    config = override(recipes.build("toy"), FIELDS)
    start_stage(config, ensure_prepared(str(folder), PrepareConfig()), f"s3://{BUCKET}/runs/cache")


@contextmanager
def _two_machines(
    logs: Path, disk: Path, hidden: Sequence[Path], store: dict[str, str]
) -> Iterator[tuple[list[Path], Job]]:
    """Yield the disks of a head and another machine of one CPU each, and how to run a job there."""
    address = f"127.0.0.1:{(port := nodes.free_port())}"
    machine = {**store, "TMPDIR": str(disk), "RAY_AUTH_MODE": "disabled"}
    options = {"hidden": [disk, *hidden], "environment": machine}
    head = nodes.node(
        logs / "head.log", "--head", "--port", str(port), "--include-dashboard", "false",
        "--node-ip-address", "127.0.0.1", "--temp-dir", str(disk / "ray"), **options,
    )  # fmt: skip
    other = nodes.node(
        logs / "other.log", "--address", address, "--node-ip-address", "127.0.0.2", **options
    )
    with head as first:
        nodes.wait(lambda: nodes.started(logs / "head.log"), first, 90, "the head starts")
        with other as second:
            nodes.wait(lambda: nodes.started(logs / "other.log"), second, 90, "the node joins")
            both = [first, second]

            def job(place: int, *command: str) -> None:
                nodes.run_on(both[place], {**machine, "RAY_ADDRESS": address}, *command)

            yield [nodes.disk_of(one, disk) for one in both], job


@pytest.mark.ray
@pytest.mark.slow
def test_jobs_complete_on_machines_that_share_no_disk(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.need_own_disks()
    runs = nodes.ROOT / "runs"
    hidden = [tmp_path_factory.getbasetemp(), *([runs] if runs.is_dir() else [])]
    with running_store(monkeypatch) as store, nodes.short_folder() as disk:
        _fill_store(tmp_path / "shop")
        flags = [f"--set={field}" for field in [*FIELDS, "training.num_workers=2"]]
        with _two_machines(tmp_path, disk, hidden, store.environment) as (disks, job):
            job(0, "jobs/train.py", "--data", DATA, "--out", RUN, "--recipe", "toy", *flags)
            for place in disks:  # each has read the items and the start, once
                (kept,) = place.glob("karma_ray-node-*")
                assert len(list(kept.glob("*.arrow"))) == 1
                assert len(list(kept.glob("copies/*/final/model.safetensors"))) >= 1
            trained = read_json(join(RUN, "metrics.json"))
            embedded = read_manifest(join(RUN, "item_embeddings"))
            job(1, "jobs/evaluate.py", RUN)
            assert read_json(join(RUN, "metrics.json"))["HR@50"] == trained["HR@50"]
            job(1, "jobs/features.py", DATA)
        stages = {line["stage"] for line in read_lines(join(RUN, "metrics.jsonl"))}
        assert stages == {"pretrain", "warmup", "joint", "valid"}
        features = read_manifest(features_uri(DATA), "visual_features")
        assert features["parents"]["items"] == embedded["parents"]["items"]
