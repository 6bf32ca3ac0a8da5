"""What `gpu_check.py` measures: batches of random numbers, models of a shape, a deadline.

Texts, histories and queries have lengths as those of a shop with short texts; everything else is
drawn from a seed, so no data, no tokenizer and no checkpoint is needed.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.shapes import BODIES, SHAPES, Words, build_body
from karma_ray.data.batch import Batch
from karma_ray.model.backbone import build_tiny
from karma_ray.model.config import ModelConfig, TinyBackboneConfig
from karma_ray.model.interest import InterestModel
from karma_ray.model.karma import DECODE_PROMPT, KarmaModel
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.loop import fit
from karma_ray.training.optim import build_optimizer
from karma_ray.training.step import JointStep

MODEL = ModelConfig(tiny=TinyBackboneConfig(64, 2, 2, 1, 128, 512))
OBJECTIVE = ObjectiveConfig(action_loss="infonce")
END_OF_TEXT, FIRST_WORD = 0, 8
"""The first ids are special tokens and prompts."""
HEADLINE = (
    "equal", "mfu", "mfu_compiled", "encode_tokens_per_s", "host_gap_share",
    "seconds_to_first_step",
)  # fmt: skip
"""What the last line says, None where it could not be had."""


@dataclass
class Check:
    """What all parts share: device, deadline, peaks and what the last line will say."""

    device: torch.device
    deadline: float
    seed: int = 0
    peaks: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    headline: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(HEADLINE))

    @property
    def on_gpu(self) -> bool:
        """Whether the shapes are the real ones."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.monotonic()

    def say(self, part: str, **facts: Any) -> None:
        """Print one line of results, and progress for a person."""
        print(json.dumps({"part": part, **facts}), flush=True)

    def say_end(self, **facts: Any) -> None:
        """Print the last line."""
        self.say("end", failed=sorted(set(self.failed)), **self.headline, **facts)

    def attempt(self, part: str, needs: float, run: Callable[[], None], **facts: Any) -> None:
        """Run unless less than `needs` seconds are left; say what was skipped and what failed."""
        if self.left() < needs:
            why = f"{self.left():.0f} s are left, {needs:.0f} are needed"
            return self.say(part, skipped=why, **facts)
        print(f"{part} {facts or ''}: {self.left():.0f} s left", file=sys.stderr, flush=True)
        try:
            run()
        except torch.OutOfMemoryError as error:
            self.say(part, error="out of memory", detail=str(error)[:200], **facts)
        except Exception as error:  # the other parts can still tell something
            self.failed.append(part)
            self.say(part, error=f"{type(error).__name__}: {error}"[:500], **facts)
        finally:
            gc.collect()  # models are cycles, and the next one needs their memory
            if self.on_gpu:
                torch.cuda.empty_cache()

    def seconds_of(self, run: Callable[[], Any], times: int = 5) -> float:
        """Median seconds of a call that ends on the device."""
        found = []
        for _ in range(times + 1):
            started = time.perf_counter()
            run()
            if self.on_gpu:
                torch.cuda.synchronize()
            found.append(time.perf_counter() - started)
        return statistics.median(found[1:])


@dataclass(frozen=True)
class Size:
    """How large a batch is; lengths are drawn evenly between their bounds."""

    users: int
    steps: tuple[int, int] = (8, 24)
    text: tuple[int, int] = (12, 48)
    query: tuple[int, int] = (2, 8)
    hard: int = 2
    decoded: int = 4
    items: int = 17_033


SMALL = Size(4, steps=(3, 6), text=(4, 16), items=500)
"""Of the batches on a CPU and in the comparison."""


def vocabulary(shape: str) -> int:
    """Number of tokens of a shape's vocabulary."""
    names = SHAPES[shape]
    return BODIES[names[0]]["vocab_size"] if names else MODEL.tiny.vocab_size


def build_model(shape: str, device: torch.device, num_layers: int = 0, seed: int = 0) -> KarmaModel:
    """A model of that shape with random weights, made on the device itself."""
    names, size = SHAPES[shape], vocabulary(shape)
    ids = {"end": END_OF_TEXT, "start": 1, "stop": 2}
    words = Words(ids, {MODEL.user_decoder.prompt: [3, 4, 5], DECODE_PROMPT: [6, 7]}, size)
    torch.manual_seed(seed)
    with device:
        if names is None:
            bodies = [build_tiny(MODEL.tiny, size, seed + n) for n in (1, 2)]
        else:
            bodies = [build_body(name, num_layers) for name in names]
    interest = InterestModel(MODEL, bodies[0], bodies[1], words, seed)
    return KarmaModel(interest, words).to(device)


def make_batch(size: Size, num_tokens: int, seed: int = 0) -> Batch:
    """A batch on the CPU, as the collator makes them."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(*size.steps, size.users, endpoint=True)
    steps = int(lengths.max())
    order = np.arange(steps)
    real = order < lengths[:, None]
    clicked = draw.integers(0, size.items, (size.users, steps))
    hard = draw.integers(0, size.items, (size.users, steps, size.hard))
    hard_mask = np.broadcast_to(real[..., None], hard.shape)
    unique = np.unique(np.concatenate([clicked[real], hard[hard_mask]]))
    texts, text_lengths = _texts(draw, len(unique), size.text, num_tokens)
    texts[np.arange(len(unique)), text_lengths - 1] = END_OF_TEXT
    queries, query_lengths = _texts(draw, 2 * size.users, size.query, num_tokens)
    query_lengths[0] = 0  # the empty query
    chosen = np.sort(draw.permuted(np.tile(order, (size.users, 1)), axis=1)[:, : size.decoded], 1)
    arrays = {
        "item_rows": unique,
        "item_tokens": texts,
        "item_lengths": text_lengths,
        "item_content": unique,
        "query_tokens": queries,
        "query_lengths": query_lengths,
        "query_index": draw.integers(0, len(queries), real.shape),
        "item_index": np.where(real, np.searchsorted(unique, clicked), 0),
        "item_mask": real,
        "step_mask": real,
        "group": np.broadcast_to(order, real.shape),
        "loss_mask": real,
        "hard_index": np.where(hard_mask, np.searchsorted(unique, hard), 0),
        "hard_mask": hard_mask,
        "decode_step": np.where(chosen < lengths[:, None], chosen, 0),
        "decode_mask": chosen < lengths[:, None],
        "row_key": draw.integers(0, 2**62, size.users),
        "visual_feature": np.zeros((size.users, chosen.shape[1], 0, 0), np.float32),
        "visual_mask": np.zeros(chosen.shape, bool),
    }
    return Batch(**{name: torch.from_numpy(value.copy()) for name, value in arrays.items()})


def prepared(check: Check, shape: str, users: int) -> tuple[KarmaModel, list[Batch], JointStep]:
    """The model on the device, two batches on the CPU, and the step with its gradient cache."""
    size = Size(users) if check.on_gpu else replace(SMALL, users=users)
    batches = [make_batch(size, vocabulary(shape), check.seed + n) for n in range(2)]
    micro = min(users, 32 if check.on_gpu else 4)
    step = JointStep(OBJECTIVE, micro_batch_size=micro, micro_tokens=0)  # as memory allows
    return build_model(shape, check.device), batches, step


def _texts(
    draw: np.random.Generator, count: int, bounds: tuple[int, int], num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    lengths = draw.integers(*bounds, count, endpoint=True)
    tokens = draw.integers(FIRST_WORD, num_tokens, (count, bounds[1]))
    tokens[np.arange(bounds[1]) >= lengths[:, None]] = END_OF_TEXT
    return tokens, lengths


def train(
    model: nn.Module, step: JointStep, batches: Sequence[Batch], seconds: float, most: int
) -> list[float]:
    """Seconds of each training step of `fit` but the first two, for about `seconds`.

    On a GPU the marks between steps are events in its stream, so that measuring makes nothing
    wait.
    """
    device = next(model.parameters()).device
    optimizer = build_optimizer(model, learning_rate=1e-5)
    ends: list[torch.cuda.Event | float] = []
    warm = [time.perf_counter()]

    def endless() -> Iterator[Batch]:
        number = 0
        while number < most and (number < 3 or time.perf_counter() - warm[-1] < seconds):
            yield batches[number % len(batches)]
            number += 1

    def mark(step: int) -> None:
        if step <= 2:  # compiling and first allocations take their own time
            warm.append(time.perf_counter())
        ends.append(_now(device))

    fit(
        model, step, optimizer, endless(), lambda record: None,
        steps=most, report_every=most + 1, after_step=mark,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [_between(a, b) for a, b in itertools.pairwise(ends[1:])]


def _now(device: torch.device) -> torch.cuda.Event | float:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: torch.cuda.Event | float, last: torch.cuda.Event | float) -> float:
    if isinstance(first, float) or isinstance(last, float):
        return float(last) - float(first)  # type: ignore[arg-type]
    return first.elapsed_time(last) / 1e3


def request_batch(batch: Batch) -> Batch:
    """The batch as requests: the last step of a window is its query, without an item."""
    last = batch.step_mask.sum(1) - 1
    mask = batch.item_mask.clone()
    mask[torch.arange(len(last), device=last.device), last] = False
    return replace(batch, item_mask=mask, loss_mask=torch.zeros_like(batch.loss_mask))


def gradient(model: nn.Module) -> Tensor:
    """All gradients in one vector on the CPU, float64; zeros where there is none."""
    parts = [
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten().double().cpu()
        for p in model.parameters()
    ]
    return torch.cat(parts)
