"""The catalogue is embedded in parts: killed and started again, or changed, only the rest is done.

Vectors of one item may differ in their last bits with the items that are encoded beside it, as a
matrix product is summed in another order for another number of rows.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from karma_ray.artifacts import (
    RunFolder,
    content_hash,
    join,
    read_manifest,
    read_table,
    write_table,
)
from karma_ray.cluster.embedding import embed_items
from karma_ray.data.catalog import Catalog
from karma_ray.data.schema import ITEMS
from karma_ray.data.work_folder import Part
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.retrieval.delta import update_run
from karma_ray.retrieval.embedding import embed_catalog, known_precision, plan_of
from karma_ray.retrieval.encode import ItemTable, load_embeddings
from karma_ray.retrieval.export import load_bundle
from karma_ray.retrieval.index_build import index_run
from karma_ray.retrieval.part_encoder import (
    CPU_SLOTS,
    CatalogEncoder,
    Contents,
    Embedding,
    PartEncoder,
    padded_slots,
)
from karma_ray.retrieval.parts import embedded, offer, to_embed
from karma_ray.retrieval.retriever import Retriever
from tests import tiny_run

ROUNDING = 1e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_run.write_run(tmp_path_factory.mktemp("embedding"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    return tiny_run.write_data(tmp_path)


class Counted:
    """Encodes in this process, notes the parts, and dies before the one with a given number."""

    def __init__(self, dies_at: int = 10**9) -> None:
        self.dies_at, self.parts, self.encoded = dies_at, list[Part](), 0

    def __call__(self, of: Embedding, parts: list[Part]) -> Iterator[dict[str, Any]]:
        encoder = PartEncoder(of)
        for part in parts:
            if len(self.parts) == self.dies_at:
                raise KeyboardInterrupt
            self.parts.append(part)
            facts = encoder(part)
            self.encoded += facts["encoded"]
            yield facts


def bundle_of(run: str) -> str:
    return RunFolder(run).bundle


def assert_same(found: ItemTable, expected: ItemTable) -> None:
    assert found.item_ids == expected.item_ids and found.titles == expected.titles
    np.testing.assert_allclose(found.embeddings, expected.embeddings, atol=ROUNDING)


def changed(data: str) -> list[str]:
    """Delete three items, add two, change a text, move the rest; returns the new texts' ids."""
    rows = read_table(join(data, "items")).to_pylist()[3:][::-1]
    rows[5]["text"] = "as good as new"
    rows[6]["price"] = 3.0  # is not encoded
    rows += [{"item_id": f"n{n}", "title": f"velvet curtain {n}"} for n in range(2)]
    write_table(pa.Table.from_pylist(rows, schema=ITEMS), join(data, "items"))
    return [rows[5]["item_id"], "n0", "n1"]


def test_an_encoder_gives_the_in_process_numbers_for_any_rows(run: str, data: str) -> None:
    expected = load_embeddings(join(run, "item_embeddings"))
    found = CatalogEncoder(bundle_of(run), data, "float32").encode(np.array([7, 0, 31])).vectors
    np.testing.assert_allclose(found, expected.embeddings[[7, 0, 31]], atol=ROUNDING)


def test_the_parts_together_are_the_catalogue_in_its_order(
    run: str, data: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    manifest = embed_catalog(bundle_of(run), data, out, part_items=7)
    assert_same(load_embeddings(out), load_embeddings(join(run, "item_embeddings")))
    assert (manifest["num_items"], manifest["encoded"], manifest["width"]) == (40, 40, 32)
    assert manifest["parents"]["items"] == content_hash(join(data, "items"))
    assert len(list(Path(out).glob("*.parquet"))) == 6
    assert not Path(f"{out}-work").exists()


def test_missing_parts_are_named(run: str, data: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder items/"):
        embed_catalog(bundle_of(run), str(tmp_path / "none"), str(tmp_path / "out"))
    with pytest.raises(InputError, match="manifest"):
        embed_catalog(str(tmp_path), data, str(tmp_path / "out"))


def test_an_interrupted_job_goes_on_and_encodes_nothing_twice(
    run: str, data: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    embed_catalog(bundle_of(run), data, out, part_items=40)
    before = read_manifest(out)
    with pytest.raises(KeyboardInterrupt):
        embed_catalog(bundle_of(run), data, out, Counted(dies_at=3), part_items=7)
    assert read_manifest(out) == before  # the earlier ones stay until the new ones are complete
    Path(f"{out}-work/table/part-9.parquet").write_bytes(b"torn")
    rest = Counted()
    assert embed_catalog(bundle_of(run), data, out, rest, part_items=7)["encoded"] == 40
    assert len(rest.parts) == 3
    assert_same(load_embeddings(out), load_embeddings(join(run, "item_embeddings")))


def test_a_job_that_is_killed_with_sigkill_leaves_parts_that_stand(
    run: str, data: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    program = (
        "import sys, time\n"
        "from karma_ray.retrieval.embedding import embed_catalog, encode_here\n"
        "def slowly(of, parts):\n"
        "    for facts in encode_here(of, parts):\n"
        "        yield facts\n"
        "        time.sleep(1)\n"
        "embed_catalog(*sys.argv[1:], slowly, part_items=2)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, bundle_of(run), data, out])
    facts = Path(f"{out}-work/facts")
    while len(list(facts.glob("*.json"))) < 2 and child.poll() is None:
        time.sleep(0.05)
    child.kill()
    child.wait()
    done = {path.stem: path.stat().st_mtime_ns for path in facts.glob("*.json")}
    tables = {name: Path(f"{out}-work/table/{name}.parquet").stat().st_mtime_ns for name in done}
    rest = Counted()
    embed_catalog(bundle_of(run), data, out, rest, part_items=2)
    assert 0 < len(done) < 20 and len(rest.parts) == 20 - len(done)
    for name, written in tables.items():
        assert Path(out, f"{name}.parquet").stat().st_mtime_ns == written
    assert_same(load_embeddings(out), load_embeddings(join(run, "item_embeddings")))


def test_parts_of_another_bundle_or_precision_do_not_stand(
    run: str, data: str, tmp_path: Path
) -> None:
    other = tiny_run.write_run(tmp_path / "other", seed=1)
    out = str(tmp_path / "out")
    for bundle, precision in ((bundle_of(run), "float32"), (bundle_of(other), "float32"),
                              (bundle_of(other), "bfloat16")):  # fmt: skip
        counted = Counted(dies_at=5)
        with pytest.raises(KeyboardInterrupt):
            embed_catalog(bundle, data, out, counted, precision=precision, part_items=7)
        assert len(counted.parts) == 5


@pytest.mark.parametrize("place", ["{}", "memory://{}"], ids=["local", "store"])
def test_only_what_changed_is_encoded_and_the_result_is_that_of_encoding_all(
    run: str, data: str, tmp_path: Path, place: str
) -> None:
    root = place.format(tmp_path)
    first, again, whole = (join(root, name) for name in ("first", "again", "whole"))
    embed_catalog(bundle_of(run), data, first, part_items=7)
    changed(data)
    counted = Counted()
    manifest = embed_catalog(bundle_of(run), data, again, counted, reuse=[first], part_items=8)
    assert (manifest["encoded"], manifest["reused"], manifest["dropped"]) == (3, 36, 3)
    assert counted.encoded == 3
    embed_catalog(bundle_of(run), data, whole)
    assert_same(load_embeddings(again), load_embeddings(whole))
    old, new = load_embeddings(first), load_embeddings(again)
    both = [item_id for item_id in new.item_ids if old.row(item_id) >= 0]
    same = new.embeddings[new.rows(both)] == old.embeddings[old.rows(both)]
    assert same.all(1).sum() == 36  # bit for bit


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_where_all_vectors_are_known_no_encoder_starts_and_no_model_is_loaded(
    run: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    first, again = str(tmp_path / "first"), str(tmp_path / "again")
    made = embed_catalog(bundle_of(run), data, first, precision=precision, part_items=7)
    rows = read_table(join(data, "items")).to_pylist()[::-1][5:]
    write_table(pa.Table.from_pylist(rows, schema=ITEMS), join(data, "items"))

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing has to be encoded")

    monkeypatch.setattr("karma_ray.retrieval.part_encoder.load_bundle", never)
    monkeypatch.setattr("karma_ray.cluster.embedding.connect", never)
    asked = "auto" if precision == "bfloat16" else precision
    manifest = embed_items(bundle_of(run), data, again, 1, asked, reuse=[first], part_items=8)
    assert (manifest["encoded"], manifest["reused"], manifest["dropped"]) == (0, 35, 5)
    assert manifest.get("accuracy") == made.get("accuracy")  # is not measured again
    old, new = load_embeddings(first), load_embeddings(again)
    assert np.array_equal(new.embeddings, old.embeddings[old.rows(new.item_ids)])


def test_an_encoder_of_items_holds_no_user_decoder(run: str, data: str) -> None:
    encoder = CatalogEncoder(bundle_of(run), data, "float32")
    whole = load_bundle(bundle_of(run)).interest
    names = [name for name, _ in encoder.bundle.interest.named_parameters()]
    assert names and not [name for name in names if name.startswith("user_decoder")]
    assert encoder.width == whole.width
    with pytest.raises(KarmaRayError, match="without its user decoder"):
        encoder.bundle.interest.user_decoder.prefix()  # type: ignore[union-attr, operator]


def test_embeddings_that_were_made_otherwise_are_not_reused(
    run: str, data: str, tmp_path: Path
) -> None:
    half, out = str(tmp_path / "half"), str(tmp_path / "out")
    embed_catalog(bundle_of(run), data, half, precision="bfloat16")
    plain = join(run, "item_embeddings")  # without hashes of what was encoded
    manifest = embed_catalog(bundle_of(run), data, out, reuse=[plain, half])
    assert (manifest["encoded"], manifest["reused"], manifest["dropped"]) == (40, 0, 0)
    assert known_precision(bundle_of(run), [plain, half]) == "bfloat16"
    assert known_precision(bundle_of(run), [plain]) is None


def test_a_catalogue_that_changes_while_the_job_is_down_costs_what_changed(
    run: str, data: str, tmp_path: Path
) -> None:
    out, whole = str(tmp_path / "out"), str(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        embed_catalog(bundle_of(run), data, out, Counted(dies_at=5), part_items=7)
    changed(data)
    rest = Counted()
    manifest = embed_catalog(bundle_of(run), data, out, rest, part_items=8)
    assert manifest["encoded"] == rest.encoded < 20 and manifest["num_items"] == 39
    embed_catalog(bundle_of(run), data, whole)
    assert_same(load_embeddings(out), load_embeddings(whole))


def test_new_embeddings_of_a_run_reuse_the_newest_and_its_index_serves(tmp_path: Path) -> None:
    data, run = tiny_run.write_data(tmp_path), tiny_run.write_run(tmp_path)
    for encoded in (40, 3):
        folder = to_embed(run)
        out = folder.item_embeddings
        manifest = embed_catalog(folder.bundle, data, out, reuse=embedded(run))
        assert manifest["encoded"] == encoded
        if encoded == 40:
            changed(data)  # and what was made is not offered: as if the job had been killed there
    offer(folder)
    index_run(run)
    best = Retriever.load(run, data=data).recall("velvet curtain", [], 3)
    assert len(best.items) == 3


def test_what_a_delta_has_encoded_is_not_encoded_again(tmp_path: Path) -> None:
    data, run = tiny_run.write_data(tmp_path), tiny_run.write_run(tmp_path)
    folder = to_embed(run)
    embed_catalog(folder.bundle, data, folder.item_embeddings)
    offer(folder)
    index_run(run)
    changed(data)
    delta = update_run(run, data)
    assert (delta.added, delta.encoded, delta.hidden) == (3, 3, 4)  # one text changed
    manifest = embed_catalog(
        folder.bundle, data, to_embed(run).item_embeddings, reuse=embedded(run)
    )
    assert (manifest["encoded"], manifest["reused"], manifest["dropped"]) == (0, 39, 3)


def test_of_items_with_equal_texts_one_is_encoded(run: str, data: str, tmp_path: Path) -> None:
    rows = tiny_run.items_table().to_pylist()
    rows += [{**row, "item_id": f"again-{row['item_id']}"} for row in rows[:10]]
    write_table(pa.Table.from_pylist(rows, schema=ITEMS), join(data, "items"))
    out = str(tmp_path / "out")
    manifest = embed_catalog(bundle_of(run), data, out)
    assert (manifest["num_items"], manifest["encoded"], manifest["reused"]) == (50, 40, 10)
    found = load_embeddings(out)
    assert np.array_equal(found.embeddings[40:], found.embeddings[:10])


def test_plans_depend_on_the_items_alone(data: str) -> None:
    catalog, contents = Catalog.load(data), Contents(False, None)
    parts = plan_of(catalog, contents, most_items=16)
    assert [(part.first, part.end) for part in parts] == [(0, 13), (13, 26), (26, 40)]
    assert plan_of(Catalog.load(data), contents, most_items=16) == parts
    assert len(plan_of(catalog, contents, fewest=5)) == 5 and len(plan_of(catalog, contents)) == 1
    changed(data)
    other = plan_of(Catalog.load(data), contents, most_items=16)
    assert not {part.name for part in parts} & {part.name for part in other}


def test_a_folder_of_items_anywhere_is_embedded_as_one_in_a_data_folder(
    run: str, data: str, tmp_path: Path
) -> None:
    store = f"memory://{tmp_path.name}/catalogues/november"
    write_table(read_table(join(data, "items")), store)
    out = str(tmp_path / "out")
    embed_catalog(bundle_of(run), store, out)
    assert_same(load_embeddings(out), load_embeddings(join(run, "item_embeddings")))
    write_table(pa.table({"name": ["a"]}), str(tmp_path / "other"))
    with pytest.raises(InputError, match="item_id"):
        embed_catalog(bundle_of(run), str(tmp_path / "other"), out)


def test_bfloat16_says_how_far_it_is_from_float32(run: str, data: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    accuracy = embed_catalog(bundle_of(run), data, out, precision="bfloat16")["accuracy"]
    assert accuracy["items"] == 40
    assert 0.99 < accuracy["min_cosine"] <= accuracy["mean_cosine"] < 1
    assert "accuracy" not in embed_catalog(bundle_of(run), data, str(tmp_path / "exact"))


def test_items_of_similar_length_share_a_batch_so_little_is_padding() -> None:
    draw = np.random.default_rng(0).normal(50, 15, 2048)
    lengths = draw.clip(4, 140).astype(np.int64)
    padded = padded_slots(lengths, CPU_SLOTS)
    assert lengths.sum() <= padded < 1.05 * lengths.sum()
    assert padded_slots(lengths[:1], 4) == lengths[0]  # longer than the slots, and alone
