"""Write a run folder of an LLM's shape with random weights, to serve it under load.

    python benchmarks/shape_run.py SHAPE OUT [--items 10000] [--layers 0]

A request costs the same with random weights as with learned ones. SHAPE names the user decoder; the
item encoder, which does not serve, is tiny, and the items have random vectors. Then for example
`python benchmarks/serve.py OUT --hosts single,uvicorn --rates 2,5,10`.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.shapes import BODIES, build_body
from karma_ray import cli
from karma_ray.artifacts import RunFolder, write_manifest
from karma_ray.data.collate import CollateConfig
from karma_ray.errors import InputError
from karma_ray.model.backbone import build_tiny
from karma_ray.model.backbones.tokenizer import train_tokenizer
from karma_ray.model.config import ModelConfig, TinyBackboneConfig
from karma_ray.model.interest import InterestModel
from karma_ray.retrieval.encode import ItemTable, save_embeddings
from karma_ray.retrieval.export import save_bundle
from karma_ray.retrieval.index_build import index_run

WORDS = tuple(map(" ".join, product(
    ("red", "blue", "green", "black", "white", "grey"), ("large", "small", "warm", "light", "new"),
    ("shirt", "mug", "lamp", "chair", "kettle", "scarf", "boots", "vase"),
)))  # fmt: skip
TINY = TinyBackboneConfig(hidden_size=32, num_heads=2, num_key_value_heads=1, intermediate_size=64)


def write_shape(shape: str, out: str, items: int, layers: int) -> None:
    """Write bundle, item embeddings and index of a run whose user decoder has that shape."""
    words, run = train_tokenizer(iter(WORDS), 512), RunFolder(out)
    size = len(words.get_vocab())  # type: ignore[attr-defined]
    encoder = build_tiny(TINY, size, 0)
    interest = InterestModel(
        ModelConfig(tiny=TINY), encoder, build_body(shape, layers), words, 0
    ).eval()
    facts = {"recipe": shape, "seed": 0}
    bundle = save_bundle(interest, words, CollateConfig(), run.bundle, facts)
    ids = [f"i{n}" for n in range(items)]
    titles = [WORDS[n % len(WORDS)] for n in range(items)]
    vectors = np.random.default_rng(0).normal(size=(items, bundle["width"])).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    parents = {"bundle": bundle["content_hash"], "items": "none"}
    save_embeddings(ItemTable(ids, titles, vectors, parents), run.item_embeddings)
    index_run(run.root)
    write_manifest(run.root, "run")


def main(argv: list[str] | None = None) -> None:
    """Write the folder."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("shape", metavar="SHAPE", help=", ".join(BODIES))
    flags.add_argument("out", metavar="OUT")
    flags.add_argument("--items", type=int, default=10_000)
    flags.add_argument("--layers", type=int, default=0, help="only so many layers; 0: all")
    given = flags.parse_args(argv)
    if given.shape not in BODIES:
        raise InputError("SHAPE", given.shape, choices=sorted(BODIES))
    write_shape(given.shape, given.out, given.items, given.layers)


if __name__ == "__main__":
    cli.run(main)
