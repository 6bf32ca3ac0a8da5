"""The training loop `fit`: plain PyTorch on one worker; needs a list of batches and a callback.

    for batch in batches:  loss = step(model, batch)  ->  backward  ->  sum over workers
                           ->  clip  ->  optimiser  ->  every `report_every` steps: report

* It does not know Ray; `batches` may be a stream and `report` may call a cluster.
* Losses are sums over a global count (training/parallel.py), so gradients are summed.
* A NaN or infinity stops all workers in the same step, names the term and saves the batch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from karma_ray.artifacts import join, open_filesystem, write_json
from karma_ray.errors import NonFiniteLoss
from karma_ray.training.meters import Meters
from karma_ray.training.optim import learning_rate_factor, set_learning_rate
from karma_ray.training.parallel import global_sum, rank, sum_gradients
from karma_ray.training.placement import clip_gradients
from karma_ray.training.profiling import profiled
from karma_ray.training.step_state import StepState

if TYPE_CHECKING:  # the loop needs the type of a step's output, not the model behind it
    from karma_ray.training.step import Step, StepOutput

Record = dict[str, float]
Report = Callable[[Record], bool | None]
"""Called with the means since the last report; a true result ends the training. All workers get
the same losses, so a decision based on them is the same everywhere."""
Prepare = Callable[[nn.Module, int, StepState], StepState]
"""Called before a step with the model, the number of finished steps and the current state;
returns the state for the step."""
Probe = Callable[[nn.Module, Any, StepState], Record]
"""Computes metrics on the batch of a report."""
_BARS = ContextVar("bars", default=True)


def keep_state(model: nn.Module, number: int, state: StepState) -> StepState:
    """Return the state unchanged."""
    return state


def fit(
    model: nn.Module,
    step: Step,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    report: Report,
    *,
    steps: int,
    start_step: int = 0,
    schedule: Callable[[int], float] | None = None,
    grad_clip: float = 1.0,
    precision: Literal["bfloat16", "float32"] = "bfloat16",
    report_every: int = 20,
    before_step: Prepare = keep_state,
    probe: Probe | None = None,
    after_step: Callable[[int], None] | None = None,
    failure_dir: str | None = None,
    progress: bool = False,
    profile_dir: str | None = None,
) -> int:
    """Train until `steps` steps are done in total or `batches` ends; returns the steps done.

    `batches` begins at `start_step`. `schedule` maps a step to a factor of the peak learning rate
    (default: `learning_rate_factor` over `steps`). `after_step` is called with the number of
    finished steps, on every worker. With `profile_dir` a trace of three steps is written to it.
    Raises NonFiniteLoss, on all workers alike, after saving the batch to `failure_dir`.
    """
    device, state = next(model.parameters()).device, StepState()
    factor = schedule or (lambda number: learning_rate_factor(number, steps))
    meters, stream, rate = Meters(getattr(torch, precision)), iter(batches), 0.0
    model.train()
    with _progress_bar(progress, steps, start_step) as bar, profiled(profile_dir) as step_done:
        for number in range(start_step, steps):
            if (batch := _next_batch(stream, device, meters)) is None:
                steps = number
                break
            with meters.paused():
                state = before_step(model, number, replace(state, progress=number / steps))
            rate = set_learning_rate(optimizer, factor(number), number)
            optimizer.zero_grad(set_to_none=True)
            with _autocast(device, precision):
                output = step(model, batch, state)
            norm = _backward(model, output, grad_clip, batch, number + 1, failure_dir)
            optimizer.step()
            meters.add(output, norm)
            stop = False
            if (number + 1) % report_every == 0 or number + 1 == steps:
                meters.note(_probed(probe, model, batch, state, precision))
                stop = bool(report(record := meters.record(number + 1, rate)))
                bar.set_postfix_str(_postfix(record), refresh=False)
            bar.update(1)
            step_done()
            if after_step is not None:
                with meters.paused():
                    after_step(number + 1)
            if stop:
                return number + 1
    if meters.num_steps:
        report(meters.record(steps, rate))
    return steps


def to_device(batch: Any, device: torch.device) -> Any:
    """Move a batch that has a method `to(device)`; batches are created on the CPU."""
    return batch.to(device) if device.type != "cpu" and hasattr(batch, "to") else batch


def _next_batch(stream: Iterator[Any], device: torch.device, meters: Meters) -> Any:
    """Return the next batch on `device`, or None at the end; its time counts as waiting."""
    waited = time.perf_counter()
    batch = next(stream, None)
    if batch is not None:
        batch = to_device(batch, device)
    meters.waited(time.perf_counter() - waited)
    return batch


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _probed(
    probe: Probe | None, model: nn.Module, batch: Any, state: StepState, precision: str
) -> Record:
    if probe is None:
        return {}
    device = next(model.parameters()).device
    # How often a run reports must not change the numbers that its dropout draws.
    own_numbers = torch.random.fork_rng([device] if device.type != "cpu" else [])
    with torch.no_grad(), own_numbers, _autocast(device, precision):
        return probe(model, batch, state)


def _backward(
    model: nn.Module, output: StepOutput, grad_clip: float, batch: Any, number: int,
    failure_dir: str | None,
) -> Tensor:  # fmt: skip
    """Compute and clip the gradients of the global loss; returns their norm before clipping.

    Raises NonFiniteLoss. What it tells of is read back once, after the backward pass, so that
    nothing waits in between.
    """
    names, bad = _bad_terms(output)
    if output.loss.requires_grad:
        output.loss.backward()  # type: ignore[no-untyped-call]
    sum_gradients(model.parameters())
    norm = clip_gradients(model, grad_clip)
    bad_norm = (~torch.isfinite(norm)).to(bad)[None]
    *terms, own, worst = torch.cat([bad, bad_norm]).tolist()
    if any(terms):
        # Logged terms are global; a worker's own loss shows whose batch is the cause.
        guilty = bool(own) or not terms[names.index("loss")]
        name = next(name for name, count in zip(names, terms, strict=True) if count)
        _refuse(name, output, batch, number, failure_dir, guilty=guilty)
    if worst:  # all workers have the norm of the summed gradients, so no exchange is needed
        _refuse("the gradient norm", output, batch, number, failure_dir, guilty=True)
    return norm


def _bad_terms(output: StepOutput) -> tuple[list[str], Tensor]:
    """Return the names of the loss terms, and on how many workers each is not finite.

    The last number tells whether this worker's own loss is not.
    """
    terms = {name: value for name, value in output.logs.items() if name.startswith("loss/")}
    terms["loss"] = output.loss
    names = sorted(terms, key=lambda name: (name in ("loss", "loss/total"), name))
    device = output.loss.device
    values = torch.stack(
        [torch.as_tensor(terms[name], device=device).detach().float() for name in names]
    )
    bad = (~torch.isfinite(values)).to(torch.int32)
    own = names.index("loss")
    return names, torch.cat([global_sum(bad), bad[own : own + 1]])


def _refuse(
    name: str, output: StepOutput, batch: Any, number: int, folder: str | None, *, guilty: bool
) -> NoReturn:
    elsewhere = f" on another worker; its batch was saved below {folder}"
    saved = _saved_failure(output, batch, number, folder) if guilty else elsewhere
    raise NonFiniteLoss(f"{name} is not finite at step {number}{saved}")


def _saved_failure(output: StepOutput, batch: Any, number: int, folder: str | None) -> str:
    """Call `_save_failure`, without letting an unavailable store hide the original error."""
    try:
        return _save_failure(output, batch, number, folder)
    except OSError as error:
        return f"; its batch could not be saved ({error})"


def _save_failure(output: StepOutput, batch: Any, number: int, folder: str | None) -> str:
    """Write the batch's tensors and the logs; returns a sentence for the error message."""
    if folder is None:
        return ""
    from safetensors.torch import save

    target = join(folder, f"step-{number:07d}-worker-{rank()}")
    fs, path = open_filesystem(target)
    fs.makedirs(path, exist_ok=True)
    with fs.open(f"{path}/batch.safetensors", "wb") as sink:
        sink.write(save(tensors_of(batch)))
    values = {"loss": output.loss, **output.logs}
    logs = {name: torch.as_tensor(value).item() for name, value in values.items()}
    write_json({"step": number, **logs}, join(target, "logs.json"))
    return f"; the batch was saved to {target}"


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """Return the named tensors of a batch: a tensor, a mapping, a sequence or a record."""
    if isinstance(batch, Tensor):
        return {"batch": batch.detach().cpu().contiguous()}
    if isinstance(batch, dict):
        fields = {str(name): value for name, value in batch.items()}
    elif isinstance(batch, (list, tuple)):
        fields = {str(place): value for place, value in enumerate(batch)}
    else:
        fields = dict(vars(batch))
    # Cloned, because fields may share storage, which safetensors refuses.
    return {
        name: value.detach().cpu().clone().contiguous()
        for name, value in fields.items()
        if isinstance(value, Tensor)
    }


@contextmanager
def without_bars() -> Iterator[None]:
    """While inside, draw no progress bar, as whoever started this process tells what it does."""
    before = _BARS.set(False)
    try:
        yield
    finally:
        _BARS.reset(before)


def _progress_bar(shown: bool, steps: int, start_step: int) -> Any:
    return tqdm(
        total=steps,
        initial=start_step,
        unit="step",
        file=sys.stderr,
        disable=not (shown and _BARS.get()) or rank() != 0,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
    )


def _postfix(record: Record) -> str:
    parts = [f"loss {record['loss/total']:.3f}"] if "loss/total" in record else []
    if "examples_per_s" in record:
        parts.append(f"{record['examples_per_s']:.0f} examples/s")
    return ", ".join(parts)
