"""Items encoded for the index, beside sentence-transformers with the same weights and texts.

    python benchmarks/encode.py [--quick] [--shapes tiny,smollm2-135m,qwen3-0.6b] [--data DATA]

Each shape has random weights, which cost what learned ones cost. Its bundle is written once and
read by both sides: by the encoder of jobs/embed.py, and as the folder of jobs/export_encoder.py by
`SentenceTransformer.encode` with its own batches. Both get the texts and make tokens of them. They
take turns, in float32 and, where the CPU has instructions for it, in bfloat16; a product of square
matrices of the same type between them says what the machine could do then. With one thread times
are those of the process, so that other work on the machine counts little; rates are medians of the
rounds, ratios medians of the rounds' ratios. Without --data texts are drawn whose numbers of words
are those of `hm`.

`cores` compares one encoder with a thread on every core with one encoder of one thread per core.
JSON lines; the last holds the headline: the smallest ratio over all shapes at equal precision, the
same at the precision that jobs/embed.py chooses by default against theirs in float32, and the
share of the peak of the last shape in float32 and by default, counting real tokens only.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pyarrow as pa
import torch

from benchmarks.shapes import build_body
from karma_ray import cli
from karma_ray.artifacts import RunFolder, join, write_table
from karma_ray.data.catalog import Catalog
from karma_ray.data.collate import CollateConfig
from karma_ray.data.schema import ITEMS
from karma_ray.errors import InputError
from karma_ray.model.backbone import build_tiny
from karma_ray.model.backbones.tokenizer import train_tokenizer
from karma_ray.model.config import ItemEncoderConfig, ModelConfig, TinyBackboneConfig
from karma_ray.model.device import cpu_computes_bfloat16
from karma_ray.model.interest import InterestModel
from karma_ray.retrieval.export import save_bundle
from karma_ray.retrieval.part_encoder import CatalogEncoder, Encoded
from karma_ray.retrieval.sentence_encoder import export_encoder
from karma_ray.training.flops import BodyCost

WORDS = (13, 29, 33, 35, 38, 40, 43, 46, 50, 57, 137)
"""Least number of words of a text of `hm`, its deciles, and the largest."""
ITEMS_OF = {"tiny": 4096, "smollm2-135m": 512, "qwen3-0.6b": 128}
QUICK = {"tiny": 2048, "smollm2-135m": 128}
BODY = {"smollm2-135m": "smollm2-135m", "qwen3-0.6b": "0.6b"}
SQUARE = 1536
"""Size of the matrices whose product is the peak."""


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("--shapes", help=f"with commas (default: {','.join(ITEMS_OF)})")
    flags.add_argument("--data", help="data folder whose items are encoded (default: drawn texts)")
    flags.add_argument("--items", type=int, help="items of every shape")
    flags.add_argument("--rounds", type=int, default=3, help="turns of each side (3)")
    flags.add_argument("--threads", type=int, default=1, help="threads of each side (1)")
    flags.add_argument("--max-tokens", type=int, default=64, help="tokens read of a text (64)")
    flags.add_argument("--quick", action="store_true", help="two shapes and few items: minutes")
    arguments = flags.parse_args(argv)
    counts = QUICK if arguments.quick else ITEMS_OF
    names = arguments.shapes.split(",") if arguments.shapes else list(counts)
    for name in names:
        if name not in ITEMS_OF:
            raise InputError("--shapes", name, choices=list(ITEMS_OF))
    torch.set_num_threads(arguments.threads)
    lines = []
    for name in names:
        count = arguments.items or counts.get(name, ITEMS_OF[name])
        with tempfile.TemporaryDirectory() as folder:
            case = Case.write(name, count, arguments.max_tokens, arguments.data, folder)
            for line in measured(case, arguments.rounds, arguments.threads):
                lines.append(line)
                print(json.dumps(line), flush=True)
            if name != "qwen3-0.6b":
                print(json.dumps(cores(case, arguments.rounds)), flush=True)
    print(json.dumps(headline(lines)))


@dataclass(frozen=True)
class Case:
    """A bundle of one shape, its exported folder, and items."""

    shape: str
    bundle: str
    exported: str
    data: str
    items: int

    @classmethod
    def write(cls, shape: str, count: int, limit: int, data: str | None, folder: str) -> Case:
        """Write everything that both sides read below `folder`."""
        texts = drawn_texts(count) if data is None else Catalog.load(data).texts()
        some = np.random.default_rng(0).permutation(len(texts))[:count]
        rows = [{"item_id": str(n), "title": texts[row]} for n, row in enumerate(some)]
        items = join(folder, "data")
        write_table(pa.Table.from_pylist(rows, schema=ITEMS), join(items, "items"))
        words = train_tokenizer(iter(texts), 4096)
        run = RunFolder(join(folder, "run"))
        model = encoder_of(shape, words)
        save_bundle(model, words, CollateConfig(max_item_tokens=limit), run.bundle)
        export_encoder(run.root, join(folder, "exported"))
        return cls(shape, run.bundle, join(folder, "exported"), items, len(rows))


def drawn_texts(count: int) -> list[str]:
    """Draw texts with as many words as those of `hm` have; frequent words are more frequent."""
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(random.choice(letters, random.integers(2, 9))) for _ in range(3000)]
    share = 1 / np.arange(10, 3010)
    lengths = np.interp(random.random(count), np.linspace(0, 1, len(WORDS)), WORDS).astype(int)
    drawn = np.split(random.choice(vocabulary, lengths.sum(), p=share / share.sum()),
                     lengths.cumsum()[:-1])  # fmt: skip
    return [" ".join(words) for words in drawn]


def encoder_of(shape: str, words: Any) -> InterestModel:
    """Build a model with an item encoder of a shape; its user decoder is not run."""
    small = TinyBackboneConfig()
    body = build_body(BODY[shape]) if shape in BODY else build_tiny(small, len(words), 1)
    pooled = ItemEncoderConfig(pool="mean" if shape in BODY else "eos")
    config = ModelConfig(tiny=small, item_encoder=pooled)
    return InterestModel(config, body, build_tiny(small, len(words), 2), words, 0).eval()


def measured(case: Case, rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    """Yield a line for each precision of a shape."""
    ours = CatalogEncoder(case.bundle, case.data, "float32", torch.device("cpu"))
    rows = np.arange(case.items)
    texts, made = ours.catalog.texts(), ours.encode(rows[:64])
    flops = work_of(ours, texts)
    kinds = ["float32", *(["bfloat16"] if cpu_computes_bfloat16() else [])]
    sides: dict[str, Callable[[], Any]] = {}
    for kind in kinds:
        library = sentence_transformer(case.exported, kind)
        same = library.encode(texts[:64], show_progress_bar=False)
        agreement = (unit(made.vectors) * unit(same)).sum(1)
        assert agreement.min() > 0.97, agreement
        sides[f"ours {kind}"] = partial(encoded_by, ours, kind, rows)
        sides[f"theirs {kind}"] = partial(library.encode, texts, show_progress_bar=False)
        sides[f"peak {kind}"] = product(getattr(torch, kind))
    seconds, found = timed(sides, rounds, time.process_time if threads == 1 else time.perf_counter)
    for kind in kinds:
        our, their = seconds[f"ours {kind}"], seconds[f"theirs {kind}"]
        encoded, took = found[f"ours {kind}"], statistics.median(our)
        peak = 2.0 * SQUARE**3 / min(seconds[f"peak {kind}"])
        yield {
            "part": "encode", "shape": case.shape, "precision": kind, "threads": threads,
            "items": case.items, "tokens_per_item": round(encoded.tokens / case.items, 1),
            "items_per_second": round(case.items / took, 1),
            "tokens_per_second": round(encoded.tokens / took),
            "padding_share": round(1 - encoded.tokens / encoded.slots, 4),
            "peak_gflops": round(peak / 1e9, 1),
            "share_of_matmul_peak": round(flops / took / peak, 3),
            "their_items_per_second": round(case.items / statistics.median(their), 1),
            "their_share_of_peak": round(flops / statistics.median(their) / peak, 3),
            "over_sentence_transformers": round(ratio(their, our), 3),
            "over_theirs_in_float32": round(ratio(seconds["theirs float32"], our), 3),
            "rounds": [round(value, 3) for value in our],
        }  # fmt: skip


def work_of(encoder: CatalogEncoder, texts: list[str]) -> float:
    """Return the operations that the real tokens of the texts cost."""
    _, lengths = encoder.tokens(texts)
    cost = BodyCost.of(encoder.bundle.interest.item_encoder.body)  # type: ignore[union-attr, arg-type]
    return cost.forward(float(lengths.sum()), float((lengths * (lengths + 1) // 2).sum()))


def encoded_by(encoder: CatalogEncoder, kind: str, rows: np.ndarray) -> Encoded:
    """Encode rows of the catalogue in another type."""
    encoder.precision = kind
    return encoder.encode(rows)


def sentence_transformer(folder: str, kind: str) -> Any:
    """Load an exported folder as anybody would."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sentence_transformers import SentenceTransformer

    options = {"torch_dtype": getattr(torch, kind)}
    model = SentenceTransformer(folder, device="cpu", local_files_only=True, model_kwargs=options)
    return model.to(getattr(torch, kind))


def product(kind: torch.dtype) -> Callable[[], Any]:
    """Return a product of square matrices."""
    left, right = (torch.randn(SQUARE, SQUARE).to(kind) for _ in range(2))
    return lambda: left @ right


def timed(
    sides: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return the seconds of each side in each round, after one that warms up, and what it gave."""
    names, found = list(sides), dict[str, Any]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = clock()
            found[name] = sides[name]()
            if turn:
                seconds[name].append(clock() - started)
    return seconds, found


def cores(case: Case, rounds: int) -> dict[str, Any]:
    """Compare an encoder for each core with one encoder that has a thread for each."""
    count = len(os.sched_getaffinity(0))
    many = [Child(case, 1) for _ in range(count)]
    alone = Child(case, count)
    took: dict[str, list[float]] = {"many": [], "alone": []}
    for turn in range(rounds + 1):
        for name, group in (("many", many), ("alone", [alone])):
            started = time.perf_counter()
            for child in group:
                child.pipe.send("encode")
            for child in group:
                child.pipe.recv()
            if turn:
                took[name].append((time.perf_counter() - started) / len(group))
    for child in [*many, alone]:
        child.pipe.send("end")
        child.process.join()
    return {
        "part": "cores", "shape": case.shape, "cores": count,
        "encoder_per_core_items_per_second": round(case.items / statistics.median(took["many"]), 1),
        "one_encoder_items_per_second": round(case.items / statistics.median(took["alone"]), 1),
        "per_core_over_one": round(ratio(took["alone"], took["many"]), 3),
    }  # fmt: skip


class Child:
    """A process that encodes all items whenever it is told."""

    def __init__(self, case: Case, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, case, threads), daemon=True)
        self.process.start()


def serve(pipe: Any, case: Case, threads: int) -> None:
    """Encode until the other side says that it is the end."""
    torch.set_num_threads(threads)
    encoder = CatalogEncoder(case.bundle, case.data, "float32", torch.device("cpu"))
    while pipe.recv() == "encode":
        encoder.encode(np.arange(case.items))
        pipe.send("done")


def headline(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the keys that are watched; our default is the last precision of a shape."""
    default = [line for line in lines if line["precision"] == lines[-1]["precision"]]
    largest = {line["precision"]: line for line in lines if line["shape"] == lines[-1]["shape"]}
    return {
        "speedup_over_sentence_transformers": min(
            line["over_theirs_in_float32"] for line in default
        ),
        "speedup_equal_precision": min(line["over_sentence_transformers"] for line in lines),
        "share_of_matmul_peak": largest["float32"]["share_of_matmul_peak"],
        "share_of_matmul_peak_by_default": lines[-1]["share_of_matmul_peak"],
        "padding_share": max(line["padding_share"] for line in lines),
    }


def ratio(over: list[float], under: list[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors [n, D] to length 1."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


if __name__ == "__main__":
    cli.run(main)
