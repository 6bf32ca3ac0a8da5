"""How a generated embedding should be sampled: a finished run of Table 2, many ways to serve it.

    python benchmarks/generators.py RUN [--data URI] [--split valid|test] [--max-examples N]

One step of flow matching or EDM is the conditional mean, more steps go to a mode; a mean of samples
goes back to the mean, a union keeps several modes (method 1.12). `h` searches with the interest
vector itself. `spread` is the deviation of the samples of a request around their mean, as a share
of the embedding's length. JSON lines; the last one holds the headline.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow as pa
import torch

from karma_ray import cli
from karma_ray.artifacts import RunFolder, absolute, read_json, read_manifest
from karma_ray.config import from_dict
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError
from karma_ray.model.interest import InterestModel
from karma_ray.retrieval.retriever import Retriever
from karma_ray.runs.evaluator import Evaluator

METRICS = ("HR@10", "HR@50", "HR@200", "NDCG@10", "gAUC", "JS@50_excl_gt")
WAYS = [
    (1, "single", 1), (1, "single", 2), (1, "single", 4), (1, "single", 0),
    (4, "mean", 0), (16, "mean", 0), (4, "union", 0), (16, "union", 0),
]  # fmt: skip
"""Samples, aggregation, steps (0: the sampler's usual)."""


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("run", metavar="RUN", help="finished run with a generator")
    flags.add_argument("--data", metavar="URI", help="prepared data (default: the run's)")
    flags.add_argument("--split", choices=["valid", "test"], default="valid", help="default valid")
    flags.add_argument("--max-examples", type=int, default=2000, help="a seeded sample")
    arguments = flags.parse_args(argv)
    run = absolute(arguments.run)
    config = from_dict(read_json(RunFolder(run).config))
    source = PreparedData.load(arguments.data or read_manifest(run, "run")["data"])
    retriever = Retriever.load(run, source.items_uri)
    interest = retriever.interest
    if not isinstance(interest, InterestModel) or interest.generator is None:
        raise InputError("RUN", arguments.run, "has no generator (recipes ar_mse to ar_fm)")
    trained = interest.generator
    sampled = replace(config.evaluation, max_examples=arguments.max_examples)
    judge = Evaluator(replace(config, evaluation=sampled), source)
    examples, found = source.examples(arguments.split), {}
    ways = WAYS if trained.config.kind != "mse" else WAYS[:1]
    for samples, agg, steps in [(0, "h", 0), *ways]:
        interest.generator = None if agg == "h" else trained.resampled(samples, agg, steps)
        metrics = judge(retriever, examples)
        line = {"way": agg, "samples": samples, "steps": steps or "usual"}
        line |= {name: round(metrics[name], 2) for name in METRICS if name in metrics}
        if agg == "union":
            line["spread"] = _spread(retriever, interest, examples.slice(0, 200))
        found[f"{agg}-{samples}-{steps}"] = line
        print(json.dumps(line), flush=True)
    best = max((line for line in found.values()), key=lambda line: line["HR@50"])
    print(json.dumps({"kind": trained.config.kind, "mode": config.objective.gen_mode,
                      "split": arguments.split, "seed": config.seed, "best": best}))  # fmt: skip


def _spread(retriever: Retriever, interest: InterestModel, examples: pa.Table) -> float:
    with torch.inference_mode():
        h = retriever.interests(examples)
        assert interest.generator is not None
        samples = interest.generator.search_with(h, retriever.keys(examples))  # [B, K, D]
    return round(float((samples - samples.mean(1, keepdim=True)).square().mean().sqrt()), 3)


if __name__ == "__main__":
    cli.run(main)
