"""How fast, how large and how exact the training engine is, on real batches.

    python benchmarks/engine.py [speed|memory|equality] [--data URI] [--recipe NAME] [--quick]
                                [--shape tiny|qwen3-0.6b|qwen3-1.7b+0.6b] [--batches FILE]

speed      the engine, the straightforward step of benchmarks/reference.py, and the engine with
           each optimisation turned off alone, round by round over the very same batches; then the
           time of each part. One point is forward, backward, clip and optimiser step.
memory     peak memory above that of model and gradients against the number of users of a step,
           with and without the gradient cache; every point in a process of its own.
equality   loss and gradients of the reference and of every variant against the engine's.

On a machine that others use too, `--threads 1 --clock cpu` counts processor time instead.
`--save-batches FILE` writes batches with which a machine without ray or data can measure. Shapes
other than `tiny` have random weights and, on a CPU, a few layers only. JSON lines; the last one
holds the headline.
"""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.engine_memory import SIZES, forget_peak, memory, memory_point, peak_gib
from benchmarks.engine_variants import OFF, Variant, breakdown, compiled, train_step
from benchmarks.engine_workload import CLOCKS, SHAPES, Workload, print_line, real_workload
from benchmarks.reference import ReferenceStep
from karma_ray import cli
from karma_ray.data.batch import Batch
from karma_ray.model.karma import KarmaModel
from karma_ray.training.flops import joint_flops, peak_flops
from karma_ray.training.gradient_cache import narrow
from karma_ray.training.memory import keep_heap
from karma_ray.training.step import JointStep, Step

CPU_LAYERS, CPU_USERS = 4, 4
"""What of a large shape is measured on a CPU."""

Ways = dict[str, tuple[Step, Variant]]


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = cli.parser(__doc__ or "", config=True)
    modes = ["speed", "memory", "equality", "memory-point"]
    flags.add_argument("mode", nargs="?", default="speed", choices=modes)
    flags.add_argument("--data", metavar="URI", help="data folder (default: the toy shop)")
    flags.add_argument("--batches", metavar="FILE", help="batches that --save-batches wrote")
    flags.add_argument("--save-batches", metavar="FILE", help="write the batches and stop")
    flags.add_argument("--num-batches", type=int, default=4, help="batches a round (default 4)")
    flags.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    flags.add_argument("--quick", action="store_true", help="2 rounds of 2 batches; small sizes")
    flags.add_argument("--compile", action="store_true", help="also the engine, layers compiled")
    flags.add_argument("--shape", choices=list(SHAPES), default="tiny", help="of the two LLMs")
    flags.add_argument("--layers", type=int, default=0, help="of a large shape (default: all)")
    flags.add_argument("--users", type=int, default=0, help="of a batch (default: all)")
    flags.add_argument("--threads", type=int, default=0, help="of the CPU (default: the recipe's)")
    flags.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: see above")
    flags.add_argument("--micro-batch-size", type=int, default=0, help="of a memory point")
    flags.add_argument("--limit-gib", type=float, default=8.0, help="no point expected above it")
    flags.add_argument("--plot", metavar="FILE.png", help="draw the memory points")
    arguments = flags.parse_args(argv)
    if arguments.quick:
        arguments.rounds, arguments.num_batches = 2, 2
    work = _workload(arguments)
    if arguments.save_batches:
        work.save(arguments.save_batches)
    elif arguments.mode == "memory-point":
        print_line(memory_point(work, arguments.micro_batch_size))
    elif arguments.mode == "memory":
        memory(work, arguments)
    elif arguments.mode == "equality":
        equality(work)
    else:
        speed(work, arguments.rounds, with_compiled=arguments.compile)


# --- speed -----------------------------------------------------------------------------------


def speed(work: Workload, rounds: int, *, with_compiled: bool = False) -> None:
    """Interleave the ways over the same batches; print each one's figures and the headline.

    A way's cost beside the engine's is the median ratio over pairs of the same batch and round:
    a slow spell of a shared machine then hits both, or stands out.
    """
    model = work.build()
    optimizer, ways = work.optimizer(model), _ways(work)
    if with_compiled:
        ways["compiled"] = (ways["engine"][0], compiled(model))
    difference = _loss_difference(work, model, ways)
    seconds, peak = _interleaved(work, model, optimizer, ways, rounds)
    for name, found in seconds.items():
        print_line({"way": _title(name), **_figures(work, found, rounds), **work.facts()})
    engine = seconds["engine"]
    parts = breakdown(work, model, optimizer, ways["engine"][0])
    print_line({"way": "engine", "share_of_time": parts, **work.facts()})
    costs = {
        name: statistics.median(a / b for a, b in zip(found, engine, strict=True))
        for name, found in seconds.items()
    }
    objective = work.config.objective
    flops = statistics.mean(
        joint_flops(
            model, batch, objective.built, encoder="full",
            positions=objective.act_positions,
        )
        for batch in work.batches
    )  # fmt: skip
    exact = work.config.training.precision == "float32"
    limit = peak_flops(work.device, torch.float32 if exact else torch.bfloat16)
    mine = _figures(work, engine, rounds)
    headline = {
        "speedup_over_reference": round(costs["reference"], 3),
        **{f"share_{name}": round(costs[name], 3) for name in OFF if name in costs},
        **{f"{name}_over_engine": round(costs[name], 3) for name in costs if name == "compiled"},
        "loss_difference": difference,
        "examples_per_s": mine["examples_per_s"],
        "tokens_per_s": mine["tokens_per_s"],
        "hours_per_million_examples": round(1e6 / mine["examples_per_s"] / 3600, 2),
        "gflop_per_step": round(flops / 1e9, 2),
        "share_of_matmul_peak": round(flops / (mine["ms_per_step"] / 1e3) / limit, 4),
        "matmul_peak_gflops": round(limit / 1e9, 1),
        "peak_gib": round(peak, 3),
    }
    print_line(headline)


def _interleaved(
    work: Workload, model: KarmaModel, optimizer: torch.optim.Optimizer, ways: Ways, rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every step by way, in one order of rounds and batches; the engine's peak."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    prepared = {name: [v.batch(b) for b in work.batches] for name, (_, v) in ways.items()}
    _, peak = forget_peak(work), 0.0
    for name, (step, variant) in ways.items():  # warm up, the engine first
        for batch in prepared[name] if name == "compiled" else prepared[name][:1]:
            with variant.patched():
                train_step(work, model, optimizer, step, batch)
        peak = peak or peak_gib(work)
    for _ in range(rounds):
        for number in range(len(work.batches)):
            for name, (step, variant) in ways.items():
                with variant.patched():
                    spent = train_step(work, model, optimizer, step, prepared[name][number])
                seconds[name].append(spent)
    return seconds, peak


def _figures(work: Workload, seconds: list[float], rounds: int) -> dict[str, Any]:
    """Medians over a way's steps of each batch, summed over the batches."""
    count = len(work.batches)
    medians = [statistics.median(seconds[number::count]) for number in range(count)]
    examples = sum(batch.num_windows for batch in work.batches)
    tokens = sum(batch.num_tokens for batch in work.batches)
    return {
        "ms_per_step": round(1e3 * statistics.mean(medians), 2),
        "spread_ms": [round(1e3 * value, 2) for value in (min(seconds), max(seconds))],
        "examples_per_s": round(examples / sum(medians), 2),
        "tokens_per_s": round(tokens / sum(medians)),
        "points": rounds * count,
    }


# --- equality --------------------------------------------------------------------------------


def equality(work: Workload) -> None:
    """Loss and gradients against the engine's, on the first batch, in both compute types."""
    headline = {}
    for precision in ("float32", "bfloat16"):
        training = replace(work.config.training, precision=precision)
        exact = replace(work, config=replace(work.config, training=training))
        model, batch = exact.build(), exact.batches[0]
        found: dict[str, tuple[float, Tensor]] = {}
        ways = _ways(exact)
        cached = JointStep(work.config.objective, micro_batch_size=max(1, batch.num_windows // 3))
        for name, (step, variant) in {**ways, "gradient_cache": (cached, Variant())}.items():
            with variant.patched():
                found[name] = _loss_and_gradient(exact, model, step, variant.batch(batch))
        loss, gradient = found.pop("engine")
        for name, (other, direction) in found.items():
            line = {
                "way": _title(name),
                "loss_difference": abs(other - loss) / abs(loss),
                "gradient_difference": float((direction - gradient).norm() / gradient.norm()),
            }
            print_line({**line, **exact.facts()})
            if name == "reference":
                for key in ("loss_difference", "gradient_difference"):
                    headline[f"{key}_{precision}"] = line[key]
    print_line(headline)


def _loss_and_gradient(
    work: Workload, model: KarmaModel, step: Step, batch: Batch
) -> tuple[float, Tensor]:
    model.zero_grad(set_to_none=True)
    output = work.forward(model, step, batch)
    if output.loss.requires_grad:
        torch.autograd.backward(output.loss)
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return output.loss.item(), torch.cat(found)


# --- what is measured ------------------------------------------------------------------------


def _ways(work: Workload) -> Ways:
    """Name -> step and variant: engine, reference, and the engine without each optimisation."""
    engine = JointStep(work.config.objective)
    ways: Ways = {
        "engine": (engine, Variant()),
        "reference": (ReferenceStep(work.config.objective), Variant()),
    }
    for name, variant in OFF.items():
        if name != "attention" or work.device == "cpu":  # a GPU takes the fused kernel anyway
            ways[name] = (engine, variant)
    return ways


def _title(name: str) -> str:
    return f"without {name}" if name in OFF else name


@torch.no_grad()
def _loss_difference(work: Workload, model: KarmaModel, ways: Ways) -> float:
    """Largest relative difference of the engine's loss from the reference's over the batches."""
    found = [
        [float(work.forward(model, ways[name][0], batch).loss) for batch in work.batches]
        for name in ("engine", "reference")
    ]
    return max(abs(a - b) / abs(b) for a, b in zip(*found, strict=True))


def _workload(arguments: Namespace) -> Workload:
    """The batches that the flags ask for, on this machine's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.batches:
        work = Workload.load(arguments.batches)
        if arguments.mode != "memory":
            work = replace(work, batches=work.batches[: arguments.num_batches])
    else:
        config = cli.load_config(arguments, "karma_text")
        count = arguments.num_batches
        if arguments.mode == "memory":
            most = SIZES[2] if arguments.quick else SIZES[-1]
            count = -(-most // config.training.batch_size)
        work = real_workload(config, arguments.data, count)
    torch.set_num_threads(arguments.threads or work.config.training.num_threads())
    keep_heap()
    large_on_cpu = arguments.shape != "tiny" and device == "cpu"
    layers = arguments.layers or (CPU_LAYERS if large_on_cpu else 0)
    users = arguments.users or (CPU_USERS if large_on_cpu and arguments.mode != "memory" else 0)
    batches = work.batches
    if users > 0:
        batches = [narrow(b, torch.arange(min(users, b.num_windows)))[0] for b in batches]
    if not arguments.save_batches:
        batches = [batch.to(device) for batch in batches]
    return replace(
        work,
        batches=batches,
        shape=arguments.shape,
        num_layers=layers,
        device=device,
        clock=arguments.clock,
    )


if __name__ == "__main__":
    cli.run(main)
