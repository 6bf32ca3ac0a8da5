"""Submit every job to a local Ray cluster with a job server, token and all, and print how it ended.

    python benchmarks/every_job.py [JOB ...] [--out FOLDER]

A toy shop of 240 items and models of a few thousand weights: what is measured is the way from
`ray job submit --working-dir .` to an exit code, not the work. The jobs run in the order below,
each on what the ones before it left; name some to run these alone in a folder of an earlier call.
JSON lines, one a job: its seconds, how it ended, and the last line of its log.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from karma_ray.cli import parser, run
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.runs.stopping import stop_on_signals

ROOT = Path(__file__).resolve().parents[1]
SHOP = {"num_items": 240, "num_users": 120}
TINY = (
    "model.tiny.hidden_size=32", "model.tiny.num_heads=2", "model.tiny.intermediate_size=64",
    "model.tiny.num_key_value_heads=1", "model.tiny.vocab_size=512", "pretrain.steps=0",
    "warmup.steps=4", "training.steps=6", "training.batch_size=8", "training.report_every=2",
    "training.validate_every=3", "training.threads_per_worker=1", "evaluation.max_examples=40",
)  # fmt: skip
"""Settings of the smallest run that has every stage."""


def settings(*more: str) -> list[str]:
    """Return flags that set TINY, and `more` after it."""
    return [word for setting in (*TINY, *more) for word in ("--set", setting)]


def every_job(out: str) -> dict[str, list[str]]:
    """Return the arguments of each job, by its name and in order; they write below `out`."""
    data, first = f"{out}/data", f"{out}/run"
    results = f"{out}/results"
    return {
        "import_data": ["toy_shop", f"{out}/shop.json", data],
        "prepare": ["--data", data],
        "features": [data, "--actors", "2"],
        "train": ["--data", data, "--out", first, "--recipe", "karma_text",
                  *settings("training.num_workers=2")],
        "embed": [first, "--actors", "2"],
        "index": [first],
        "evaluate": [first],
        "diagnose": [first, "--items", "40"],
        "export_encoder": [first, f"{out}/encoder"],
        "tune": ["tune_spaces/lambdas.py", "--data", data, "--out", f"{out}/search", "--trials",
                 "2", "--measure-seeds", "1", *settings()],
        "ablate": ["baselines", "--rows", "popularity", "--seeds", "1", "--data", data,
                   "--results", results, *settings()],
    }  # fmt: skip


class LocalCluster:
    """`ray start --head` with a job server: loopback, a token, and ports and folders of its own."""

    def __init__(self, folder: Path, num_cpus: int = 4) -> None:
        self._folder, self._num_cpus = folder, num_cpus
        self.port, dashboard, self._agent, self._client = (_free_port() for _ in range(4))
        self._dashboard = dashboard
        self.address = f"http://127.0.0.1:{dashboard}"
        self._temporary = Path(f"/tmp/kr-{self.port}")  # sockets need a short path
        self._process: subprocess.Popen[bytes] | None = None
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        left_out = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_ID")
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in left_out},
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        }  # fmt: skip

    def __enter__(self) -> LocalCluster:
        command = [
            *self._ray("start", "--head", "--block"), "--port", self.port,
            "--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1",
            "--dashboard-port", self._dashboard, "--dashboard-agent-listen-port", self._agent,
            "--ray-client-server-port", self._client, "--num-cpus", self._num_cpus,
            "--object-store-memory", 256 * 2**20, "--temp-dir", self._temporary,
        ]  # fmt: skip
        with open(self._folder / "cluster.log", "wb") as log:
            self._process = subprocess.Popen(
                [str(word) for word in command], env=self.environment,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + 120
        while self.ray("job", "list").returncode:
            if self._process.poll() is not None or time.monotonic() > end:
                self.__exit__()
                raise KarmaRayError(f"no job server: {self._folder / 'cluster.log'} says why")
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes of this cluster and no others, as `ray stop` would."""
        assert self._process is not None
        try:
            found = psutil.Process(self._process.pid)
            for one in [*found.children(recursive=True), found]:
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass
        self._process.wait()
        shutil.rmtree(self._temporary, ignore_errors=True)

    @property
    def logs(self) -> Path:
        """The folder of Ray's own logs, also of the jobs."""
        return self._temporary / "session_latest" / "logs"

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Ray's `ray job` against this cluster."""
        group, verb, *rest = words
        command = [*self._ray(group, verb), "--address", self.address, *rest]
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False
        )

    def submit(self, name: str, *words: str, wait: bool = True) -> tuple[int, str]:
        """Submit `python WORDS...` from the checkout; returns the exit code and the job's log.

        The project's code is uploaded as `--working-dir .` says; `name` must be new.
        """
        flags = ["--submission-id", name, "--working-dir", ".", *(() if wait else ("--no-wait",))]
        done = self.ray("job", "submit", *flags, "--", "python", *words)
        log = self.ray("job", "logs", name).stdout if wait else ""
        return done.returncode, log or done.stdout + done.stderr

    def status(self, name: str) -> str:
        """Return what the job server calls the state of a job: PENDING, RUNNING, STOPPED, ..."""
        said = self.ray("job", "status", name)
        text = said.stdout + said.stderr
        states = ("PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED")
        return next((state for state in states if state in text or state.lower() in text), text)

    def _ray(self, *words: str) -> list[str]:
        return [str(Path(sys.executable).parent / "ray"), *words]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(argv: list[str] | None = None) -> None:
    """Submit the jobs, and raise KarmaRayError if one failed."""
    flags = parser(__doc__ or "")
    flags.add_argument("jobs", metavar="JOB", nargs="*", help="jobs to submit (default: all)")
    flags.add_argument("--out", help="folder of what they write (default: a new temporary one)")
    arguments = flags.parse_args(argv)
    out = Path(arguments.out or tempfile.mkdtemp(prefix="every-job-")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    (out / "shop.json").write_text(json.dumps(SHOP))
    jobs = every_job(str(out))
    for name in arguments.jobs:
        if name not in jobs:
            raise InputError("JOB", name, choices=list(jobs))
    failed = []
    stop_on_signals()  # SIGTERM too ends the cluster
    with LocalCluster(out) as cluster:
        for name in arguments.jobs or jobs:
            begun = time.monotonic()
            code, said = cluster.submit(name, f"jobs/{name}.py", *jobs[name])
            (out / f"{name}.log").write_text(said)
            ended = cluster.status(name)
            failed += [name] if code or ended != "SUCCEEDED" else []
            last = [line for line in said.splitlines() if line.strip()][-1:]
            facts = {"job": name, "seconds": round(time.monotonic() - begun, 1), "exit": code}
            print(json.dumps(facts | {"ended": ended, "last": "".join(last)}), flush=True)
    if failed:
        raise KarmaRayError(f"failed: {', '.join(failed)}; their logs are in {out}")


if __name__ == "__main__":
    run(main)
