"""The Ray job makes the numbers that the process makes, also when its encoders are killed."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from karma_ray.artifacts import join, read_manifest, read_table
from karma_ray.cluster.embedding import embed_items
from karma_ray.errors import InputError
from karma_ray.retrieval.encode import load_embeddings
from karma_ray.retrieval.index_build import index_run
from karma_ray.retrieval.retriever import Retriever
from tests import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("embedding")
    tiny_run.write_data(root)
    return tiny_run.write_run(root)


def data_of(run: str) -> str:
    return str(Path(run).parent / "data")


def is_ours(process: int) -> bool:
    """Whether the process was started by this one, or by one that it started."""
    while process > 1 and process != os.getpid():
        status = Path(f"/proc/{process}/stat").read_text()
        process = int(status.rpartition(")")[2].split()[1])
    return process == os.getpid()


def encoders_here() -> list[int]:
    """The process ids of the encoders of this session's Ray: others have theirs beside it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"EmbeddingActor" in path.read_bytes() and is_ours(int(path.parent.name)):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


class Killer(threading.Thread):
    """Kills an encoder when the first part is finished, and notes the parts that were."""

    def __init__(self, facts: Path) -> None:
        super().__init__(daemon=True)
        self.facts, self.killed, self.done = facts, 0, dict[str, int]()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.killed and not self.over.wait(0.01):
            self.done = {p.stem: p.stat().st_mtime_ns for p in self.facts.glob("*.json")}
            if self.done and (found := encoders_here()):
                os.kill(found[0], signal.SIGKILL)
                self.killed = found[0]


def test_a_pool_needs_an_encoder(run: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--actors"):
        embed_items(join(run, "bundle"), data_of(run), str(tmp_path / "out"), num_actors=0)


@pytest.mark.ray
def test_encoders_on_every_cpu_make_the_same_embeddings_and_the_run_serves_them(
    two_cpus: None, run: str
) -> None:
    out = join(run, "item_embeddings")
    expected = load_embeddings(out)
    stale = Path(out, "part-99999.parquet")
    stale.write_bytes(Path(out, "part-00000.parquet").read_bytes())
    bundle = join(run, "bundle")
    manifest = embed_items(bundle, data_of(run), out, num_actors=2)
    found = load_embeddings(out, read_manifest(bundle)["content_hash"])
    assert not stale.exists() and found.num_items == manifest["num_items"] == 40
    np.testing.assert_allclose(
        found.in_order(expected.item_ids).embeddings, expected.embeddings, atol=1e-5
    )
    kind = read_table(out).schema.field("embedding").type
    assert kind.list_size == 32 and str(kind.value_type) == "float"
    index_run(run)
    best = Retriever.load(run, data=data_of(run)).recall("red mug", [], 3)
    assert len(best.items) == 3


@pytest.mark.ray
def test_an_encoder_that_is_killed_loses_nothing_and_repeats_nothing(
    two_cpus: None, run: str, tmp_path: Path
) -> None:
    out, expected = str(tmp_path / "out"), load_embeddings(join(run, "item_embeddings"))
    killer = Killer(Path(f"{out}-work/facts"))
    killer.start()
    manifest = embed_items(join(run, "bundle"), data_of(run), out, num_actors=1, part_items=1)
    killer.over.set()
    killer.join()
    found = load_embeddings(out)
    assert killer.killed and manifest["encoded"] == 40 and found.item_ids == expected.item_ids
    np.testing.assert_allclose(found.embeddings, expected.embeddings, atol=1e-5)
    for name, written in killer.done.items():
        assert Path(out, f"{name}.parquet").stat().st_mtime_ns <= written
