"""What the engine is measured on: real batches, and a model of a named shape.

Batches come from the input pipeline of a data folder, or from a file that `--save-batches` wrote,
so that a machine without ray and without the data can measure the same steps. Weights are random:
they cost the same to train.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from benchmarks.shapes import BODIES, SHAPES, Words, build_body
from karma_ray.artifacts import absolute
from karma_ray.config import Config, from_dict, to_dict
from karma_ray.data.batch import Batch
from karma_ray.errors import InputError
from karma_ray.model.backbone import build_tiny
from karma_ray.model.interest import InterestModel
from karma_ray.model.karma import DECODE_PROMPT, KarmaModel
from karma_ray.training.loop import tensors_of
from karma_ray.training.optim import build_optimizer
from karma_ray.training.step import Step, StepOutput
from karma_ray.training.step_state import AT_THE_END

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Workload:
    """Batches, and how a model of them is built and stepped."""

    config: Config
    words: Words
    batches: list[Batch]
    shape: str = "tiny"
    num_layers: int = 0  # 0: as many as the shape has
    device: str = "cpu"
    clock: str = "wall"

    def build(self) -> KarmaModel:
        """A model with random weights on the device."""
        names, seed = SHAPES[self.shape], self.config.seed
        with torch.device(self.device):
            if names is None:
                tiny = self.config.model.tiny
                bodies = [build_tiny(tiny, self.words.size, seed + n) for n in (1, 2)]
            else:
                bodies = [build_body(name, self.num_layers) for name in names]
        interest = InterestModel(self.config.model, *bodies, self.words, seed)
        return KarmaModel(interest, self.words).to(self.device)

    def optimizer(self, model: KarmaModel) -> torch.optim.Optimizer:
        """The optimiser of the joint stage."""
        training = self.config.training
        return build_optimizer(
            model, learning_rate=training.learning_rate, weight_decay=training.weight_decay
        )

    def autocast(self, precision: str | None = None) -> AbstractContextManager[Any]:
        """The compute type of the joint stage."""
        if (precision or self.config.training.precision) == "float32":
            return nullcontext()
        return torch.autocast(self.device, dtype=torch.bfloat16)

    def forward(self, model: KarmaModel, step: Step, batch: Batch) -> StepOutput:
        """The loss of a batch, with gradients if the step makes them itself."""
        with self.autocast():
            return step(model, batch, AT_THE_END)

    def finish(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def now(self) -> float:
        """Seconds of the clock that steps are measured by."""
        return CLOCKS[self.clock]()

    def facts(self) -> dict[str, Any]:
        """The settings that stand in every line."""
        training = self.config.training
        names = SHAPES[self.shape]
        deepest = max((BODIES[name]["num_hidden_layers"] for name in names or ()), default=0)
        layers = self.num_layers or deepest
        return {
            "shape": self.shape,
            "layers": self.config.model.tiny.num_layers if self.shape == "tiny" else layers,
            "users": self.batches[0].num_windows,
            "threads": torch.get_num_threads(),
            "precision": training.precision,
            "device": self.device,
            "clock": self.clock,
        }

    def save(self, path: str) -> None:
        """Write batches, prompts and configuration as one safetensors file."""
        tensors = {
            f"{number}.{name}": value
            for number, batch in enumerate(self.batches)
            for name, value in tensors_of(batch).items()
        }
        facts = {"config": to_dict(self.config), "words": asdict(self.words)}
        save_file(tensors, path, {"facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: str) -> Workload:
        """Read what `save` wrote."""
        if not Path(path).exists():
            raise InputError("--batches", path, "is no file; --save-batches writes one")
        fields: dict[int, dict[str, Tensor]] = {}
        with safe_open(path, "pt") as stored:
            facts = json.loads(stored.metadata()["facts"])
            for key in stored.keys():  # noqa: SIM118
                number, name = key.split(".")
                fields.setdefault(int(number), {})[name] = stored.get_tensor(key)
        batches = [Batch(**fields[number]) for number in sorted(fields)]
        return cls(from_dict(facts["config"]), Words(**facts["words"]), batches)


def real_workload(config: Config, data: str | None, num_batches: int) -> Workload:
    """The first batches of the joint stage, through the pipeline; needs ray."""
    from karma_ray.cluster.session import connect
    from karma_ray.cluster.sharding import ensure_prepared
    from karma_ray.runs.batches import WorkerContext, local_blocks
    from karma_ray.runs.first_stages import start_stage
    from karma_ray.runs.joint import joint_job
    from karma_ray.runs.sources import CACHE, toy_shop

    config = replace(
        config,
        pretrain=replace(config.pretrain, steps=0),
        warmup=replace(config.warmup, skip=True),
        training=replace(config.training, steps=num_batches, encoder_delay=0.0),
    )
    connect()
    source = ensure_prepared(absolute(data) if data else toy_shop(), config.prepare)
    stage = start_stage(config, source, absolute(CACHE))
    tokenizer = stage.tokenizer()
    decoder, encoder = config.model.user_decoder, config.model.item_encoder
    texts = [text for text in (decoder.prompt, encoder.instruction, DECODE_PROMPT) if text]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    words = Words(
        {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.text_marks},
        dict(zip(texts, prompts, strict=True)),
        len(tokenizer),  # type: ignore[arg-type]
    )
    with tempfile.TemporaryDirectory() as folder:
        job = joint_job(stage, source, folder)
        batches = list(job.make_batches(WorkerContext(0, 1, 0, num_batches, local_blocks)))
    return Workload(config, words, batches)


def merged(batches: Sequence[Batch]) -> Batch:
    """One batch of all windows, with one table of unique items."""
    facts = [batch.item_rows for batch in batches]
    rows, place = torch.unique(torch.cat(facts), return_inverse=True)
    first = torch.full((len(rows),), len(place)).scatter_reduce(
        0, place, torch.arange(len(place)), "amin"
    )
    width = max(batch.item_tokens.shape[1] for batch in batches)
    tokens = [_widened(batch.item_tokens, 1, width) for batch in batches]
    result: dict[str, Tensor] = {"item_rows": rows, "item_tokens": torch.cat(tokens)[first]}
    for name in ("item_lengths", "item_content"):
        result[name] = torch.cat([getattr(batch, name) for batch in batches])[first]
    items = torch.tensor([0, *(len(found) for found in facts)]).cumsum(0)
    queries = torch.tensor([0, *(len(batch.query_lengths) for batch in batches)]).cumsum(0)
    for name in vars(batches[0]):
        if name in result:
            continue
        parts = [getattr(batch, name) for batch in batches]
        if name in ("item_index", "hard_index"):
            parts = [place[part + start] for part, start in zip(parts, items, strict=False)]
        elif name == "query_index":
            parts = [part + start for part, start in zip(parts, queries, strict=False)]
        for axis in range(1, parts[0].ndim):
            longest = max(part.shape[axis] for part in parts)
            parts = [_widened(part, axis, longest) for part in parts]
        result[name] = torch.cat(parts)
    return Batch(**result)


def _widened(value: Tensor, axis: int, size: int) -> Tensor:
    padding = [0, 0] * (value.ndim - 1 - axis) + [0, size - value.shape[axis]]
    return functional.pad(value, padding)


def print_line(facts: dict[str, Any]) -> None:
    """One JSON line on stdout."""
    print(json.dumps(facts), flush=True)
