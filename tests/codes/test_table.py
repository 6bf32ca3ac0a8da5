"""The table of codes: parts, resumption, refusals and ids that stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from karma_ray.artifacts import read_manifest, read_table, write_manifest, write_table
from karma_ray.codes.codebooks import Codebooks
from karma_ray.codes.config import KINDS, CodesConfig
from karma_ray.codes.table import Coding, PartCoder, assign_here, code_catalog, load_codes
from karma_ray.data.work_folder import Part
from karma_ray.errors import InputError, SkewError

CONFIG = CodesConfig(codewords=8, fsq_levels=(4, 4), iterations=10)


def drawn(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)[:count]


def embeddings(folder: Path, count: int = 300, bundle: str = "b") -> str:
    values = pa.array(drawn(count).reshape(-1))
    ids = [f"i{n}" for n in range(count)]
    vectors = pa.FixedSizeListArray.from_arrays(values, 8)
    write_table(pa.table({"item_id": ids, "embedding": vectors}), str(folder))
    facts = {"parents": {"bundle": bundle}, "num_items": count, "width": 8}
    write_manifest(str(folder), "item_embeddings", **facts)
    return str(folder)


def test_a_row_per_item_with_the_codes_of_its_vector(tmp_path: Path) -> None:
    source, out = embeddings(tmp_path / "e"), str(tmp_path / "codes")
    manifest = code_catalog(source, out, CONFIG)
    table = read_table(out)
    assert table.schema.field("codes").type == pa.list_(pa.int32())
    assert table.column("item_id").to_pylist() == [f"i{n}" for n in range(300)]
    expected = Codebooks.fit(drawn(300), CONFIG).encode(drawn(300))
    assert table.column("codes").to_pylist() == expected.tolist()
    assert manifest == read_manifest(out, "item_codes")
    assert manifest["num_items"] == 300 and manifest["sizes"] == [8, 8, 16]
    assert manifest["parents"]["embeddings"] == read_manifest(source)["content_hash"]
    assert 0 <= manifest["collision_rate"] < 1 and len(manifest["errors"]) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_parts_give_the_table_of_the_whole(tmp_path: Path, kind: Any) -> None:
    config = CodesConfig(kind=kind, codewords=8, fsq_levels=(4, 4), iterations=10)
    source = embeddings(tmp_path / "e")
    whole = code_catalog(source, str(tmp_path / "whole"), config)
    parts = code_catalog(source, str(tmp_path / "parts"), config, part_items=70)
    assert len(list((tmp_path / "parts").glob("*.parquet"))) == 5
    assert read_table(str(tmp_path / "parts")).equals(read_table(str(tmp_path / "whole")))
    for name in ("collision_rate", "errors", "used", "mean_cosine"):
        assert parts[name] == pytest.approx(whole[name], abs=2e-6)


def test_an_interrupted_call_goes_on_where_it_was(tmp_path: Path) -> None:
    source, out = embeddings(tmp_path / "e"), str(tmp_path / "codes")

    def cut(of: Coding, parts: list[Part]) -> Iterator[dict[str, Any]]:
        coder = PartCoder(of)
        yield coder(parts[0])
        yield coder(parts[1])
        raise ConnectionError("the worker is gone")

    with pytest.raises(ConnectionError):
        code_catalog(source, out, CONFIG, assign=cut, part_items=70)
    assert not Path(out).exists()
    done: list[str] = []

    def rest(of: Coding, parts: list[Part]) -> Iterator[dict[str, Any]]:
        done.extend(part.name for part in parts)
        yield from assign_here(of, parts)

    code_catalog(source, out, CONFIG, assign=rest, part_items=70)
    assert done == ["part-000000000140", "part-000000000210", "part-000000000280"]
    code_catalog(source, str(tmp_path / "whole"), CONFIG)
    assert read_table(out).equals(read_table(str(tmp_path / "whole")))
    assert not Path(f"{out}-work").exists()


def test_codes_of_other_embeddings_are_refused(tmp_path: Path) -> None:
    source, out = embeddings(tmp_path / "e"), str(tmp_path / "codes")
    code_catalog(source, out, CONFIG)
    assert load_codes(out, read_manifest(source)["content_hash"]).codes.shape == (300, 3)
    other = read_manifest(embeddings(tmp_path / "other", 299))["content_hash"]
    with pytest.raises(SkewError, match=rf"codes of embeddings .* here are {other}"):
        load_codes(out, other)


def test_ids_stay_when_items_are_added(tmp_path: Path) -> None:
    """With the codebooks of yesterday, an item whose vector is the same has the same codes."""
    yesterday, today = str(tmp_path / "1"), str(tmp_path / "2")
    code_catalog(embeddings(tmp_path / "e1"), yesterday, CONFIG)
    code_catalog(embeddings(tmp_path / "e2", 420), today, CONFIG, codebooks=yesterday)
    before, after = load_codes(yesterday), load_codes(today)
    assert after.item_ids[:300] == before.item_ids and len(after.item_ids) == 420
    assert np.array_equal(after.codes[:300], before.codes)
    same = [read_manifest(folder)["parents"]["codebooks"] for folder in (yesterday, today)]
    assert same[0] == same[1]


def test_codebooks_of_another_bundle_are_refused(tmp_path: Path) -> None:
    code_catalog(embeddings(tmp_path / "e"), str(tmp_path / "codes"), CONFIG)
    other = embeddings(tmp_path / "other", bundle="c")
    with pytest.raises(SkewError, match="bundle b, these are of c"):
        code_catalog(other, str(tmp_path / "new"), CONFIG, codebooks=str(tmp_path / "codes"))


def test_missing_codebooks_and_embeddings_without_items_are_refused(tmp_path: Path) -> None:
    source = embeddings(tmp_path / "e")
    with pytest.raises(InputError, match=r"--codebooks.*holds no codebooks"):
        code_catalog(source, str(tmp_path / "new"), CONFIG, codebooks=str(tmp_path / "none"))
    with pytest.raises(InputError, match="holds no items"):
        code_catalog(embeddings(tmp_path / "empty", 0), str(tmp_path / "new"), CONFIG)
