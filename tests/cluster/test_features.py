"""jobs/features.py: the same folder in one process and on Ray, whole or not at all."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs import features as job
from karma_ray.artifacts import (
    content_hash,
    join,
    read_lines,
    read_manifest,
    read_table,
    write_json,
    write_table,
)
from karma_ray.cluster.features import is_enough
from karma_ray.cluster.features import make_features as make_on_ray
from karma_ray.data.catalog import Catalog
from karma_ray.data.pictures import decode
from karma_ray.data.schema import ITEMS, SEQUENCES
from karma_ray.data.visual import VisualFeatures
from karma_ray.errors import InputError
from karma_ray.model.backbones.vision_encoder import load_vision_encoder
from karma_ray.runs import features
from karma_ray.runs.features import FeaturesConfig, make_features
from tests import tiny
from tests.model.test_vision import _folder

SMALL = FeaturesConfig(width=6)


def picture(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(coarse).resize((40, 60)).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> str:
    """49 items in two files: three have no image, two a broken one."""
    images = [picture(row) for row in range(tiny.catalog().num_items)]
    images[3] = images[30] = images[48] = None  # type: ignore[call-overload]
    images[5] = images[40] = b"not an image"
    table = tiny.catalog().table.append_column("image", pa.array(images, pa.binary()))
    write_table(table.slice(0, 25).select(ITEMS.names), join(str(tmp_path), "items"), "a")
    write_table(table.slice(25).select(ITEMS.names), join(str(tmp_path), "items"), "b")
    return str(tmp_path)


def _prepare(data: str, item_ids: list[str]) -> None:
    rows = tiny.sequences(tiny.window(item_ids))
    write_table(rows.select(SEQUENCES.names), join(data, "sequences"))
    write_json({}, join(data, "prepared.json"))


def test_the_job_writes_what_load_reads(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    job.main([data, "--width", "6", "--actors", "1"])
    printed = capsys.readouterr().out
    assert "16 x 6 per image" in printed and "explained variance" in printed
    folder = join(data, "visual_features")
    facts = read_manifest(folder, "visual_features")
    counts = ("num_items", "with_image", "without_image", "broken_image")
    assert [facts[name] for name in counts] == [49, 44, 3, 2]
    assert facts["fitted_on"] == "all items" and 0.1 < facts["explained_variance"] < 1
    assert facts["parents"] == {"items": content_hash(join(data, "items"))}
    broken = list(read_lines(join(folder, "quarantine.jsonl")))
    assert [(b["item_id"], b["row"]) for b in broken] == [("i5", 5), ("i40", 15)]
    names = sorted(path.name for path in Path(folder).iterdir())
    parts = ["part-000000000000.parquet", "part-000000000025.parquet"]
    assert names == ["manifest.json", *parts, "patch_pca.safetensors", "quarantine.jsonl"]

    catalog = Catalog.load(data, join(data, "cache"))
    values, present = VisualFeatures.load(folder, catalog).gather(np.arange(49))
    assert np.flatnonzero(~present).tolist() == [3, 5, 30, 40, 48]
    flat = values[present].reshape(-1, 6)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(flat.std(0), 1, atol=1e-4)


def test_components_and_deviation_are_those_of_the_training_items(data: str) -> None:
    trained = [f"i{n}" for n in (0, 1, 2, 3, 5, 6, 7, 8)]
    _prepare(data, trained)
    facts = make_features(data, SMALL)
    assert facts["fitted_on"] == "training items" and facts["fitted_images"] == 6
    catalog = Catalog.load(data, join(data, "cache"))
    loaded = VisualFeatures.load(join(data, "visual_features"), catalog)
    values, present = loaded.gather(catalog.rows(trained))
    flat = values[present].reshape(-1, 6)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(flat.T @ flat / len(flat), np.eye(6), atol=1e-3)  # whitened
    values, present = loaded.gather(np.arange(20, 49))
    assert np.abs(values[present].reshape(-1, 6).std(0) - 1).max() > 0.05


def test_a_finished_folder_is_kept_until_something_changes(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_features(data, SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(features, "encode_fragment", None)
        assert make_features(data, SMALL) == first
    other = make_features(data, FeaturesConfig(width=3, target="pooled:1"))
    assert (other["num_tokens"], other["width"]) == (1, 3)
    _prepare(data, ["i0", "i1", "i2"])
    assert make_features(data, SMALL)["key"] != first["key"]
    write_table(read_table(join(data, "items")).slice(0, 20), join(data, "items"), "a")
    assert make_features(data, SMALL)["num_items"] < 49


def test_an_interrupted_job_leaves_the_old_folder_and_goes_on_where_it_was(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_features(data, FeaturesConfig(width=3))
    encode, done = features.encode_fragment, []

    def dies(fragment, *arguments):
        if done:
            raise KeyboardInterrupt
        done.append(fragment.order)
        return encode(fragment, *arguments)

    monkeypatch.setattr(features, "encode_fragment", dies)
    with pytest.raises(KeyboardInterrupt):
        make_features(data, SMALL)
    assert read_manifest(join(data, "visual_features")) == old

    def counted(fragment, *arguments):
        done.append(fragment.order)
        return encode(fragment, *arguments)

    monkeypatch.setattr(features, "encode_fragment", counted)
    resumed = make_features(data, SMALL)
    assert done == [0, 25] and not Path(data, "visual_features-work").exists()
    monkeypatch.setattr(features, "encode_fragment", encode)
    assert make_features(data, SMALL, join(data, "whole")) == resumed


KILLED = """
import os, signal, sys
from karma_ray.data import work_folder
from karma_ray.runs.features import FeaturesConfig, make_features
data, name, count = sys.argv[1:]
whole, left = getattr(work_folder, name), [int(count)]
def dying(*arguments):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*arguments)
setattr(work_folder, name, dying)
make_features(data, FeaturesConfig(width=6))
"""
"""Dies before a function is called for so many times."""


@pytest.mark.parametrize(
    ("name", "count", "left"),
    [
        ("write_json", 3, [25]),  # the rows of the second part are written, its facts are not
        ("move", 1, []),  # the old folder is gone, the new one is not at its place
    ],
)
def test_a_process_that_is_killed_is_started_again_and_encodes_no_part_twice(
    data: str, monkeypatch: pytest.MonkeyPatch, name: str, count: int, left: list[int]
) -> None:
    old, folder = make_features(data, FeaturesConfig(width=3)), join(data, "visual_features")
    call = [sys.executable, "-c", KILLED, data, name, str(count)]
    died = subprocess.run(call, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    if name == "move":
        assert not Path(folder).exists()
    else:
        assert read_manifest(folder) == old
    encode, done = features.encode_fragment, []

    def counted(fragment, *arguments):
        done.append(fragment.order)
        return encode(fragment, *arguments)

    monkeypatch.setattr(features, "encode_fragment", counted)
    resumed = make_features(data, SMALL)
    assert done == left and not Path(f"{folder}-work").exists()
    assert make_features(data, SMALL, join(data, "whole")) == resumed
    found, whole = (
        {path.name: path.read_bytes() for path in Path(place).iterdir()}
        for place in (folder, join(data, "whole"))
    )
    assert found == whole


def test_a_hugging_face_folder_gives_its_own_numbers(data: str, tmp_path: Path) -> None:
    folder = _folder("vit", tmp_path)
    facts = make_features(data, FeaturesConfig(folder, "grid:16"), join(data, "vit"))
    assert (facts["num_tokens"], facts["width"]) == (16, 16)
    table = read_table(join(data, "vit"))
    encoder = load_vision_encoder(folder, 4)
    pixels = decode(picture(7), encoder.side)
    row = table.column("item_id").to_pylist().index("i7")
    found = np.array(table.column("feature")[row].as_py()).reshape(16, 16)
    np.testing.assert_allclose(found, encoder(pixels[None])[0], atol=1e-4)


def test_wrong_input_is_named(data: str, tmp_path: Path) -> None:
    for config, words in (
        (FeaturesConfig(target="grid:9"), "--target"),
        (FeaturesConfig(width=0), "--width"),
        (FeaturesConfig("some/folder", width=5), "--width: 5 is for patch_pca only"),
        (FeaturesConfig(str(tmp_path / "nowhere")), "--encoder"),
    ):
        with pytest.raises(InputError, match=words):
            make_features(data, config)
    with pytest.raises(InputError, match="--actors"):
        make_on_ray(data, SMALL, num_actors=0)
    with pytest.raises(InputError, match="--data"):
        make_features(join(data, "nowhere"), SMALL)
    write_json({"kind": "bundle"}, join(data, "bundle", "manifest.json"))
    with pytest.raises(InputError, match="holds bundle"):
        make_features(data, SMALL, join(data, "bundle"))


def test_a_catalogue_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    rows = [{"item_id": "a", "title": "t", "image": b"x"}, {"item_id": "b", "title": "t"}]
    write_table(pa.Table.from_pylist(rows, schema=ITEMS), join(str(tmp_path), "items"))
    with pytest.raises(InputError, match="no readable image"):
        make_features(str(tmp_path), SMALL)
    with pytest.raises(InputError, match="no readable image, for example in no known format"):
        make_features(str(tmp_path), FeaturesConfig(_folder("vit", tmp_path)))
    assert not Path(tmp_path, "visual_features").exists()


def test_one_row_group_needs_no_ray_but_for_a_gpu_of_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert is_enough(None, 1, uses_gpu=True) and not is_enough(None, 2, uses_gpu=False)
    assert is_enough(1, 2, uses_gpu=True) and not is_enough(2, 3, uses_gpu=False)
    monkeypatch.setenv("RAY_JOB_ID", "01000000")
    assert is_enough(None, 1, uses_gpu=False)
    assert not is_enough(None, 1, uses_gpu=True)


@pytest.mark.ray
def test_encoders_on_every_cpu_make_the_same_folder(
    two_cpus: None, data: str, caplog: pytest.LogCaptureFixture
) -> None:
    alone = make_features(data, SMALL, join(data, "alone"))
    with caplog.at_level("INFO"):
        together = make_on_ray(data, SMALL, join(data, "together"), num_actors=3)
        assert make_on_ray(data, SMALL, join(data, "by default")) == alone
    assert together == alone
    assert (
        "encoding images with 2 encoders instead of 3: items/ has 2 row groups to do" in caplog.text
    )
    assert caplog.text.count("encoding images with 2 encoders on CPUs") == 2
