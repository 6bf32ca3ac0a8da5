"""One training worker: it builds the model, restores, trains, checkpoints, evaluates and saves.

The same function runs in the driver's process (`num_workers = 0`, without Ray) and inside Ray
Train; only the `Channel` through which it reports differs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import torch
from torch import nn

from karma_ray.artifacts import join, write_json
from karma_ray.errors import StorageError, TakenOver
from karma_ray.evaluation.alarm import Alarm, messages
from karma_ray.runs import stopping
from karma_ray.runs.batches import WorkerContext
from karma_ray.runs.cost import peak_gib, process_began
from karma_ray.runs.run_log import RunLog
from karma_ray.training.checkpoints.checkpoint import Progress, load_checkpoint, save_weights
from karma_ray.training.checkpoints.outage import reason, redacted, retried
from karma_ray.training.checkpoints.store import CheckpointStore
from karma_ray.training.config import TrainingConfig
from karma_ray.training.loop import Prepare, Probe, Record, fit, keep_state
from karma_ray.training.memory import keep_heap, trim_heap
from karma_ray.training.optim import (
    RateMultiplier,
    build_optimizer,
    common_schedule,
    learning_rate_factor,
)
from karma_ray.training.order import Order, Window
from karma_ray.training.parallel import barrier, global_sum, rank, world_size
from karma_ray.training.placement import place

if TYPE_CHECKING:
    from karma_ray.training.step import Step


LOG = logging.getLogger(__name__)
TRIM_SECONDS = 60.0
"""Time between two returns of freed memory to the system, which slow the next steps (L12)."""


@dataclass(frozen=True)
class TrainJob:
    """One stage of training. Everything in it is sent to the workers (by cloudpickle)."""

    run: str
    """Run folder, a path or URI."""
    stage: str
    """`pretrain`, `warmup` or `joint`; part of the names of checkpoints and log lines."""
    build: Callable[[], nn.Module]
    """Builds the model with its initial weights, on the CPU."""
    step: Step
    """Computes the loss of a batch (training/step.py)."""
    make_batches: Callable[[WorkerContext], Iterable[Any]]
    """Returns this worker's batches of steps `start_step` to `steps`."""
    training: TrainingConfig
    """Steps, learning rate, precision, reports, checkpoints, workers."""
    seed: int = 0
    """Seed of the workers' torch random state (dropout)."""
    multiplier_of: Callable[[str], RateMultiplier] = common_schedule
    """Learning-rate multiplier of a parameter, by its name: rate, start and rise."""
    probe: Probe | None = None
    """Measures collapse metrics on the batch of every report."""
    validate: Callable[[nn.Module, int], Mapping[str, float]] | None = None
    """Computes validation metrics every `validate_every` steps and at the end. All workers call it,
    and get the same."""
    should_stop: Callable[[Record], bool] | None = None
    """Ends the stage early; may use only losses, which are equal on all workers."""
    before_step: Prepare = keep_state
    """Called on every worker before each step; it fills the history bank."""

    @property
    def checkpoints(self) -> str:
        """The folder of this stage's checkpoints (training/checkpoints/store.py)."""
        return join(self.run, "checkpoints", self.stage)

    @property
    def owner(self) -> str:
        """The file with the number of the newest start of this stage."""
        return join(self.run, "owners", f"{self.stage}.json")

    @property
    def final(self) -> str:
        """The folder of the final weights and the summary."""
        return join(self.checkpoints, "final")


class Channel(Protocol):
    """How a worker communicates with the process that started it."""

    in_driver: bool
    """Whether this is the process that a person started, which shows alarms itself."""
    device: torch.device

    def read_blocks(self, order: Order, windows: Sequence[Window]) -> Iterator[pa.Table]:
        """Return the rows of training batches (runs/batches.py)."""

    def report(self, record: Record) -> None:
        """Report the record; under Ray this is a barrier."""


def run_worker(job: TrainJob, channel: Channel, progress: bool = False) -> dict[str, Any]:
    """Train one stage to its end; returns the summary that rank 0 writes.

    Raises, on all workers alike, NonFiniteLoss, TakenOver when another process has started to
    continue the run, and StorageError when the final weights cannot be written.
    """
    training, started = job.training, time.perf_counter()
    reached = {"process": process_began(), "entered": time.time()}
    torch.set_num_threads(training.num_threads())
    keep_heap()
    torch.manual_seed(job.seed)
    model = place(job.build(), training, channel.device)
    optimizer = build_optimizer(
        model, learning_rate=training.learning_rate, weight_decay=training.weight_decay,
        multiplier_of=job.multiplier_of,
    )  # fmt: skip
    # Set before the restore, which may load the random state of a checkpoint.
    torch.manual_seed(job.seed + 1_000_003 * (rank() + 1))
    store = CheckpointStore(
        job.checkpoints,
        keep=training.keep_checkpoints,
        best_metric=training.best_metric,
        owner=job.owner,
        device=channel.device,
    )
    found = store.restore(lambda folder: load_checkpoint(folder, model, optimizer))
    start = found.step if found else 0
    log = RunLog(job.run, job.stage, start) if rank() == 0 else None
    reached["model"] = time.time()
    hooks = _Hooks(job, channel, model, optimizer, log, store, reached)
    try:
        done = _fitted(job, channel, model, optimizer, hooks, start, progress)
        store.finish()
        hooks.validate(done)
    except BaseException:
        store.finish(hurried=True)
        raise
    finally:
        if log is not None:
            log.close()
    summary = {
        "stage": job.stage,
        "weights": job.final,
        "steps": done,
        "seconds": time.perf_counter() - started,
        "last": hooks.last,
        "valid": hooks.valid,
        "failed_checkpoints": len(store.failed),
        "peak_gib": peak_gib(),
        "reached": reached,
    }
    _save_final(job.final, model, summary, channel.device)
    return summary


def _fitted(
    job: TrainJob,
    channel: Channel,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    hooks: _Hooks,
    start: int,
    progress: bool,
) -> int:
    """Call `fit` from step `start`; returns the number of finished steps."""
    training = job.training
    context = WorkerContext(rank(), world_size(), start, training.steps, channel.read_blocks)
    return fit(
        model,
        job.step,
        optimizer,
        job.make_batches(context),
        hooks.report,
        steps=training.steps,
        start_step=start,
        schedule=lambda n: learning_rate_factor(n, training.steps, training.lr_warmup_share),
        grad_clip=training.grad_clip,
        precision=training.precision,
        report_every=training.report_every,
        before_step=job.before_step,
        probe=job.probe,
        after_step=hooks.after_step,
        failure_dir=join(job.run, "failures", job.stage),
        progress=progress,
        profile_dir=join(job.run, "profile", job.stage) if training.profile else None,
    )


def _save_final(
    folder: str, model: nn.Module, summary: dict[str, Any], device: torch.device
) -> None:
    """Save the weights, then the summary that marks them complete; raises on all workers alike."""
    failure: StorageError | None = None
    try:
        save_weights(folder, model)
        if rank() == 0:
            retried(lambda: write_json(summary, join(folder, "summary.json")))
    except StorageError as error:
        failure = error
    except Exception as error:
        failure = StorageError("final weights", redacted(folder), reason(error))
    # Collective, so that no worker keeps waiting for one that has failed.
    if _anywhere(failure is not None, device):
        raise failure or StorageError("final weights", redacted(folder), "failed on rank 0")


def _anywhere(mine: bool, device: torch.device) -> bool:
    """Whether `mine` is true on any worker."""
    return bool(global_sum(torch.tensor(int(mine), device=device)))


class _Hooks:
    """What happens between steps: reports, checkpoints and validation."""

    def __init__(
        self,
        job: TrainJob,
        channel: Channel,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        log: RunLog | None,
        store: CheckpointStore,
        reached: dict[str, float],
    ) -> None:
        self._job, self._channel, self._log, self._store = job, channel, log, store
        self._model, self._optimizer, self._reached = model, optimizer, reached
        self.last: Record = {}
        self.valid: Record = {}
        self._validated = -1
        self._stalled = 0.0
        self._trimmed = time.monotonic()
        self._alarm = None
        if log is not None and job.stage == "joint":
            self._alarm = Alarm.of(model, job.training.steps, log.earlier)

    def report(self, record: Record) -> bool:
        lost = rank() == 0 and not self._store.is_owner()
        if _anywhere(lost, self._channel.device):
            raise TakenOver(f"{self._job.run}: another process continues this run")
        record = self.last = {**record, "checkpoint_stall_share": self._stall_share(record)}
        if self._alarm is not None:
            record = self.last = {**record, **self._alarm(record)}
            if self._channel.in_driver:  # another driver reads metrics.jsonl and shows the alarm
                for message in messages(record):
                    LOG.warning("%s", message)
        if self._log is not None:
            self._log.add(record)
        self._channel.report(record)
        return self._job.should_stop is not None and self._job.should_stop(record)

    def _stall_share(self, record: Record) -> float:
        """Return the share of the time since the last report spent waiting for checkpoints."""
        stalled = self._store.stall_seconds - self._stalled
        self._stalled = self._store.stall_seconds
        return stalled / max(record.get("seconds", 0.0) + stalled, 1e-9)

    def after_step(self, step: int) -> None:
        self._reached.setdefault("first_step", time.time())
        if self._channel.device.type == "cpu" and time.monotonic() > self._trimmed + TRIM_SECONDS:
            trim_heap()
            self._trimmed = time.monotonic()
        job = self._job
        training = job.training
        if training.validate_every and step % training.validate_every == 0:
            self.validate(step)
        stops = stopping.is_requested() and step < training.steps
        if stops or (training.checkpoint_every and step % training.checkpoint_every == 0):
            score = self.valid.get(training.best_metric) if self._validated == step else None
            if self._log is not None:
                self._log.flush()  # a restart from this checkpoint needs the lines before it
            self._store.save(self._model, self._optimizer, Progress(step), score=score)
        if stops:
            LOG.info("%s: stopped after step %d of %d", job.stage, step, training.steps)
            stopping.stop()

    def validate(self, step: int) -> None:
        """Evaluate with all workers, preserving the random state of training."""
        if self._job.validate is None or step == self._validated:
            return
        self._validated = step
        self._model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            self.valid = {**self._job.validate(self._model, step)}
        self._model.train()
        if self._log is not None:
            self._log.add({"step": step, **self.valid}, stage="valid")
        barrier()
        # Every worker must report equally often; the record of rank 0 is used.
        self._channel.report({"step": step, **{f"valid/{k}": v for k, v in self.valid.items()}})
