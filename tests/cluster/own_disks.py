"""Jobs on machines that share no disk, with an S3 store between them, and one machine is lost.

`python benchmarks/own_disks.py` prints what happens when; `test_own_disks.py` checks it.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from karma_ray import recipes
from karma_ray.artifacts import read_lines, read_table, write_table
from karma_ray.config import override
from karma_ray.data.config import PrepareConfig
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.node_cache import upload
from karma_ray.runs.first_stages import start_stage
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.training.checkpoints.files import CheckpointFiles
from tests.cluster import nodes
from tests.cluster.stores import BUCKET
from tests.model.test_vision import _folder
from tests.runs.test_pipeline import SMALL

DATA, RUN = f"s3://{BUCKET}/shop", f"s3://{BUCKET}/runs/first"
SEARCH, ENCODER = f"s3://{BUCKET}/runs/search", f"s3://{BUCKET}/vit"
LARGE, COPIES = f"s3://{BUCKET}/large", 220
"""A log of so many copies of every user, which is too large to be prepared by one process."""
FIELDS = [*SMALL, "training.precision=float32", "training.validate_every=6"]
STEPS = 100
LONG = [f"training.steps={STEPS}", "training.report_every=10", "training.checkpoint_every=10",
        f"training.validate_every={STEPS}", "training.num_workers=2"]  # fmt: skip
"""A training that takes long enough to lose a machine in."""
SPACE = """
from ray import tune
SPACE = {"objective.lambda_dec": tune.uniform(0.0, 1.0)}
METRIC = "valid/HR@50"
BASE_RECIPE = "toy"
FIXED = ()
"""


def fill_store(folder: Path) -> None:
    """Raw logs with items in two files, an encoder of images, and a cache of first stages."""
    write_toy_shop(str(folder), ToyShopConfig(num_items=240, num_users=120))
    (part,) = folder.glob("items/*.parquet")
    items = pq.read_table(part)
    part.unlink()
    for number, start in enumerate((0, 120)):
        write_table(items.slice(start, 120), str(folder / "items"), f"part-{number:05d}")
    upload(folder, DATA)
    upload(Path(_folder("vit", folder.parent)), ENCODER)
    config = override(recipes.build("toy"), FIELDS)
    start_stage(config, ensure_prepared(str(folder), PrepareConfig()), f"s3://{BUCKET}/runs/cache")


def fill_with_large_log(shop: Path) -> None:
    """Put LARGE into the store, made of the shop that `fill_store` has written."""
    folder = shop.with_name("large")
    shutil.copytree(shop / "items", folder / "items")
    shutil.copy(shop / "manifest.json", folder)
    events = read_table(str(shop / "events"))
    place = events.column_names.index("user_id")
    copies = [
        events.set_column(
            place, "user_id", pc.binary_join_element_wise(events["user_id"], str(copy), "-")
        )
        for copy in range(COPIES)
    ]
    write_table(pa.concat_tables(copies), str(folder / "events"))
    upload(folder, LARGE)


class Machines:
    """Machines of one CPU each, of which the first is the head."""

    def __init__(
        self, stack: ExitStack, logs: Path, disk: Path, hidden: Sequence[Path],
        store: dict[str, str],
    ) -> None:  # fmt: skip
        self.timeline: list[dict[str, Any]] = []
        """What happened, in order: `at` (seconds since the start), `what`, and on which machine."""
        self.home = disk
        """What each machine calls the folder that is its own."""
        self._stack, self._logs = stack, logs
        self._hidden = [disk, *hidden]
        self._port = nodes.free_port()
        self._environment = {**store, "TMPDIR": str(disk), "RAY_AUTH_MODE": "disabled"}
        self._up: dict[str, subprocess.Popen[bytes]] = {}
        self._known, self._began = 0, time.time()

    def join(self) -> str:
        """Start a machine; returns its address once it has joined."""
        self._known += 1
        name, log = f"127.0.0.{self._known}", self._logs / f"{self._known}.log"
        if self._known == 1:
            flags = nodes.as_head(self._port, self.home / "ray")
        else:
            flags = ["--address", f"127.0.0.1:{self._port}", "--node-ip-address", name]
        machine = self._stack.enter_context(
            nodes.node(log, *flags, hidden=self._hidden, environment=self._environment)
        )
        nodes.wait(lambda: nodes.started(log), machine, 120, f"{name} starts")
        self._up[name] = machine
        self.note("joins", machine=name)
        return name

    def lose(self, name: str) -> None:
        """Kill all processes of a machine at once."""
        nodes.kill(self._up.pop(name))
        self.note("is lost", machine=name)

    def disk(self, name: str) -> Path:
        """Return where this process sees the disk of a machine."""
        return nodes.disk_of(self._up[name], self.home)

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a job on a machine."""
        self.note("starts", machine=name, job=command[0])
        environment = {**self._environment, "RAY_ADDRESS": f"127.0.0.1:{self._port}"}
        job = nodes.start_on(self._up[name], environment, *command)
        self._stack.callback(job.kill)
        return job

    def finish(self, job: subprocess.Popen[bytes], name: str, command: str) -> None:
        """Wait for a job; it must end well."""
        assert job.wait(400) == 0, command
        self.note("ends", machine=name, job=command)

    def run(self, name: str, *command: str) -> None:
        """Run a job on a machine to its end."""
        self.finish(self.start(name, *command), name, command[0])

    def note(self, what: str, at: float | None = None, **facts: Any) -> None:
        """Add to the timeline what happens now, or happened `at` a time of the clock."""
        seconds = round((at or time.time()) - self._began, 1)
        self.timeline.append({"at": seconds, "what": what, **facts})
        self.timeline.sort(key=lambda event: event["at"])


@contextmanager
def two_machines(
    logs: Path, disk: Path, hidden: Sequence[Path], store: dict[str, str]
) -> Iterator[Machines]:
    """A head and another machine."""
    with ExitStack() as stack:
        machines = Machines(stack, logs, disk, hidden, store)
        machines.join()
        machines.join()
        yield machines


def train_while_one_is_lost(machines: Machines, head: str, lost: str) -> str:
    """Train on two machines, lose one in the middle, add another; returns its address."""
    flags = [f"--set={field}" for field in [*FIELDS, *LONG]]
    command = ["jobs/train.py", "--data", DATA, "--out", RUN, "--recipe", "toy", *flags]
    job = machines.start(head, *command)
    checkpoints = CheckpointFiles(f"{RUN}/checkpoints/joint")
    nodes.wait(lambda: any(map(checkpoints.has_marker, checkpoints.steps())), job, 300,
               "a checkpoint")  # fmt: skip
    machines.lose(lost)
    machines.note("is kept", step=max(filter(checkpoints.has_marker, checkpoints.steps())))
    new = machines.join()
    machines.finish(job, head, command[0])
    for start in read_lines(f"{RUN}/starts.jsonl"):
        # Ray tells the head's outer address in place of loopback.
        where = [name if name in (lost, new) else head for name in start.pop("machines")]
        machines.note("workers start", machines=where, **start)
    return new


def search(machines: Machines, head: str) -> None:
    """Two trials on two machines."""
    (machines.disk(head) / "space.py").write_text(SPACE)
    flags = [f"--set={field}" for field in FIELDS]
    machines.run(head, "jobs/tune.py", str(machines.home / "space.py"), "--trials", "2",
                 "--measure-seeds", "0", "--data", DATA, "--out", SEARCH, *flags)  # fmt: skip


def pooled_features(machines: Machines, name: str) -> None:
    """One vector an image, by an encoder on each machine."""
    machines.run(name, "jobs/features.py", DATA, "--encoder", ENCODER, "--target", "pooled:1",
                 "--actors", "2")  # fmt: skip


def prepare_large_log(machines: Machines, name: str) -> None:
    """Parts and partitions of a log, as tasks of all machines."""
    machines.run(name, "jobs/prepare.py", "--data", LARGE)


def embed_again(machines: Machines, name: str) -> None:
    """The catalogue in other numbers, by an encoder on each machine."""
    machines.run(name, "jobs/embed.py", RUN, "--precision", "bfloat16", "--actors", "2")
