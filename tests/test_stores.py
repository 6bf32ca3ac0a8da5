"""A store that fails now and then is asked again; one that is down for good is told in a sentence.

The server is a real one of the S3 API on loopback, behind a proxy that injects the faults.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import s3fs
from botocore.retries.standard import ExponentialBackoff

from jobs import import_data
from karma_ray import cli
from karma_ray.artifacts import new_file, open_filesystem, read_json, read_table, write_table
from karma_ray.data.config import PrepareConfig
from karma_ray.node_cache import upload
from karma_ray.retrieval.embedding import embed_catalog
from karma_ray.retrieval.encode import load_embeddings
from karma_ray.runs.features import FeaturesConfig, make_features
from karma_ray.runs.preparation import prepare
from tests import tiny_run
from tests.cluster.stores import BUCKET, Store, running_store
from tests.data.test_pictures import coded
from tests.flaky import TIMEOUT, flaky_proxy

ITEMS = "item_id,title\n" + "".join(f"{n},thing {n}\n" for n in range(4))
LOG = "user_id,timestamp,item_id,clicked\n" + "".join(
    f"u{n % 5},{1_700_000_000 + n},{n % 4},{n % 3 == 0:d}\n" for n in range(60)
)


def write_logs(folder: Path) -> tuple[str, str]:
    (folder / "items.csv").write_text(ITEMS)
    (folder / "log").mkdir()
    header, *rows = LOG.splitlines(keepends=True)
    for part in ("a", "b"):
        lines = [header, *(f"{part}{row}" for row in rows)]
        (folder / "log" / f"{part}.csv").write_text("".join(lines))
    return str(folder / "log"), str(folder / "items.csv")


@contextmanager
def failing_answers(patch: pytest.MonkeyPatch, store: Store) -> Iterator[None]:
    """Let every third answer of the store fail, and each kind of failure happen again and again."""
    # The pauses are botocore's; waiting for them tests nothing.
    patch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.01)
    # No answer takes a second: it is given twice, and then only refusals.
    faults = ([503, 500] * 6 + [TIMEOUT]) * 2 + [503, 500] * 1000
    with flaky_proxy(store.port, faults) as proxy:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        patch.setattr(s3fs.S3FileSystem, "read_timeout", 1)
        s3fs.S3FileSystem.clear_instance_cache()
        yield
        assert all(proxy.injected[fault] > 1 for fault in (503, 500, TIMEOUT)), proxy.injected


def test_import_and_prepare_survive_every_third_answer_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, items = write_logs(tmp_path)
    local = str(tmp_path / "local")
    expected = import_data.main(["long", log, local, "--items", items])
    with running_store(monkeypatch) as store:
        fs = s3fs.S3FileSystem()
        with pytest.raises(RuntimeError), new_file(f"s3://{BUCKET}/half") as sink:
            sink.write(b"half of it")
            raise RuntimeError
        assert not fs.exists(f"{BUCKET}/half")
        fs.put(log, f"{BUCKET}/log", recursive=True)
        fs.put(items, f"{BUCKET}/items.csv")
        with failing_answers(monkeypatch, store):
            out = f"s3://{BUCKET}/data"
            made = import_data.main(
                ["long", f"s3://{BUCKET}/log", out, "--items", f"s3://{BUCKET}/items.csv"]
            )
            prepare(out, PrepareConfig())
            assert read_json(f"{out}/prepared.json")["counts"]["clicks"] == made["counts"]["clicks"]
    assert made["data_hash"] == expected["data_hash"]
    assert read_table(f"{local}/events").num_rows == made["counts"]["events"]


def test_embeddings_and_features_survive_every_third_answer_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pa.array([coded((6 * n, 9, 250 - n)) for n in range(40)])
    rows = tiny_run.items_table().drop_columns(["image"]).append_column("image", images)
    local, config = str(tmp_path / "data"), FeaturesConfig(target="pooled:1", width=2)
    for part in range(2):
        write_table(rows[20 * part : 20 * part + 20], f"{local}/items", f"part-{part}")
    bundle = f"{tiny_run.write_run(tmp_path)}/bundle"
    embed_catalog(bundle, local, str(tmp_path / "embedded"), part_items=8)
    expected = make_features(local, config)
    with running_store(monkeypatch) as store:
        there = f"s3://{BUCKET}"
        upload(Path(local, "items"), f"{there}/data/items")
        upload(Path(bundle), f"{there}/bundle")
        with failing_answers(monkeypatch, store):
            embed_catalog(f"{there}/bundle", f"{there}/data", f"{there}/embedded", part_items=8)
            found = load_embeddings(f"{there}/embedded")
        with failing_answers(monkeypatch, store):
            facts = make_features(f"{there}/data", config)
            features = read_table(f"{there}/data/visual_features")
    whole = load_embeddings(str(tmp_path / "embedded"))
    assert found.item_ids == whole.item_ids
    np.testing.assert_allclose(found.embeddings, whole.embeddings, atol=1e-5)
    assert facts == expected and features.equals(read_table(f"{local}/visual_features"))


def test_a_store_that_is_down_for_good_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, items = write_logs(tmp_path)
    for name, value in (
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9"), ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_MAX_ATTEMPTS", "2"), ("NO_PROXY", "127.0.0.1"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(SystemExit) as ended:
        cli.run(import_data.main, ["long", log, "s3://bucket/data", "--items", items])
    s3fs.S3FileSystem.clear_instance_cache()
    told = capsys.readouterr().err.strip()
    assert ended.value.code == 1 and told.count("\n") == 0
    assert told.startswith("error: the object store did not answer") and "127.0.0.1:9" in told


def test_what_the_user_sets_goes_before_our_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.delenv("AWS_MAX_ATTEMPTS", raising=False)
    retries = {"mode": "standard", "total_max_attempts": 6}
    assert open_filesystem("s3://b/c")[0].config_kwargs == {"retries": retries}
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    assert open_filesystem("s3://b/c")[0].config_kwargs == {"retries": {"mode": "standard"}}
    assert open_filesystem("/b/c")[1] == "/b/c"
