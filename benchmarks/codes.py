"""Fit and assignment of semantic ids, beside faiss' own residual quantiser.

    python benchmarks/codes.py [--items 100000 --items 1000000] [--width 64] [--quick]

Vectors are drawn as embeddings lie (benchmarks/index.py). Both kinds of codes and faiss'
ResidualQuantizer of the same shape (three levels of 256 codes; its beam of one item is the greedy
assignment, its default of five is the slower search) are fitted on the same sample and assign the
same vectors, each in a process of its own. JSON lines, one for each way; the last line is the
headline: items a second of `res_kmeans_fsq`, and the time at 10,000,000 items, on one core. Times
are CPU seconds of one thread, so that other work on the machine counts little. Peak memory is what
the process takes beside its libraries, with the pages that it has mapped of the file of vectors,
which a system short of memory takes back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.index import drawn
from karma_ray import cli
from karma_ray.codes.codebooks import Codebooks, sample_of
from karma_ray.codes.config import KINDS, CodesConfig
from karma_ray.codes.quality import coded, collisions

WAYS = (*KINDS, "faiss, beam 1", "faiss, beam 5")
LARGE = 10_000_000
ALONE = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("--items", type=int, action="append", help="items (100000; repeatable)")
    flags.add_argument("--width", type=int, default=64, help="numbers of a vector (64)")
    flags.add_argument("--sample", type=int, default=65_536, help="items of the fit (65536)")
    flags.add_argument("--quick", action="store_true", help="20000 items and a sample of 8192")
    flags.add_argument("--one", nargs=2, metavar=("WAY", "FILE"), help="one way, in this process")
    arguments = flags.parse_args(argv)
    if arguments.one:
        print(json.dumps(measured(*arguments.one, arguments.sample)))
        return
    counts = [20_000] if arguments.quick else arguments.items or [100_000]
    sample = 8192 if arguments.quick else arguments.sample
    lines: list[dict[str, Any]] = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder, "vectors.npy"))
            np.save(path, drawn(count, arguments.width, 1)[0])
            for way in WAYS:
                command = [sys.executable, __file__, "--one", way, path, "--sample", str(sample)]
                said = subprocess.run(
                    command, check=True, capture_output=True, text=True, env=ALONE
                ).stdout
                lines.append(json.loads(said.splitlines()[-1]))
                print(json.dumps(lines[-1]), flush=True)
    print(json.dumps(headline(lines[-len(WAYS) :])))


def headline(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of the largest catalogue, flat."""
    ours, rival, greedy, _ = lines
    seconds = ours["fit_seconds"] + LARGE / ours["items_per_second"]
    return {
        "items": ours["items"],
        "items_per_second": ours["items_per_second"],
        "fit_seconds": ours["fit_seconds"],
        "seconds_at_10m": round(seconds, 1),
        "over_faiss": round(ours["items_per_second"] / greedy["items_per_second"], 2),
        "collision_rate": ours["collision_rate"],
        "rq_kmeans_collision_rate": rival["collision_rate"],
        "faiss_collision_rate": greedy["collision_rate"],
        "peak_mib": ours["peak_mib"],
    }


def measured(way: str, path: str, sample: int) -> dict[str, Any]:
    """Fit and assign in one way."""
    vectors = np.load(path, mmap_mode="r")
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    config = CodesConfig(kind=way if way in KINDS else "rq_kmeans", sample=sample)  # type: ignore[arg-type]
    started = time.process_time()
    if way in KINDS:
        books = Codebooks.fit(vectors, config)
        fitted = time.process_time()
        codes, tally = coded(books, vectors)
        error = tally.square_errors[-1] / tally.variance
    else:
        quantiser = trained(vectors, config, int(way.split()[-1]))
        fitted = time.process_time()
        codes, error = assigned(quantiser, vectors)
    seconds = time.process_time() - fitted
    return {
        "way": way, "items": len(vectors), "width": vectors.shape[1], "sample": sample,
        "fit_seconds": round(fitted - started, 2),
        "items_per_second": round(len(vectors) / seconds),
        "collision_rate": round(collisions(codes, config.sizes)[0], 4),
        "error": round(error, 4),
        "peak_mib": round(_resident("VmHWM") - before),
    }  # fmt: skip


def trained(vectors: np.ndarray, config: CodesConfig, beam: int) -> Any:
    """Return faiss' residual quantiser, fitted on the same sample."""
    import faiss

    quantiser = faiss.ResidualQuantizer(vectors.shape[1], config.levels, 8)
    quantiser.max_beam_size = beam
    if beam == 1:
        quantiser.train_type = faiss.ResidualQuantizer.Train_default
    quantiser.train(sample_of(vectors, config))
    return quantiser


def assigned(quantiser: Any, vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """Return codes [n, 3], and the error as a share of the variance."""
    codes, rest, variance, mean = [], 0.0, 0.0, vectors.mean(0, dtype=np.float64)
    for start in range(0, len(vectors), 16_384):
        block = np.array(vectors[start : start + 16_384])
        variance += float(np.square(block - mean).sum())
        packed = quantiser.compute_codes(block)
        rest += float(np.square(block - quantiser.decode(packed), dtype=np.float64).sum())
        codes.append(packed.astype(np.int32))
    return np.concatenate(codes), rest / variance


def _resident(field: str) -> float:
    """Return VmRSS, what is in memory, or VmHWM, the most that was, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


if __name__ == "__main__":
    cli.run(main)
