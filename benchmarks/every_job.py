"""Submit every job to a local Ray cluster with a job server, token and all, and print how it ended.

    python benchmarks/every_job.py [JOB ...] [--out FOLDER] [--mistakes]

A toy shop of 240 items and models of a few thousand weights: what is measured is the way from
`ray job submit --working-dir .` to an exit code, not the work. The jobs run in the order below,
each on what the ones before it left; name some to run these alone in a folder of an earlier call.
The endpoint is asked for items and then stopped. With --mistakes every job is told to read what
does not exist, and has to fail with a message and no traceback. JSON lines, one a job: its seconds,
how it ended, and the last line of its log.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from karma_ray.cli import parser, run
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.runs.stopping import stop_on_signals
from karma_ray.serving.process import free_port

ROOT = Path(__file__).resolve().parents[1]
SHOP = {"num_items": 240, "num_users": 120}
PATIENT = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
"""Gives a job that is stopped a minute to end; Ray's own 3 seconds are few for an endpoint."""
TINY = (
    "model.tiny.hidden_size=32", "model.tiny.num_heads=2", "model.tiny.intermediate_size=64",
    "model.tiny.num_key_value_heads=1", "model.tiny.vocab_size=512", "pretrain.steps=0",
    "warmup.steps=4", "training.steps=6", "training.batch_size=8", "training.report_every=2",
    "training.validate_every=3", "training.threads_per_worker=1", "evaluation.max_examples=40",
)  # fmt: skip
"""Settings of the smallest run that has every stage."""
TINY_RANKER = (
    "ranking.width=4", "ranking.hidden=8", "ranking.attention_hidden=4", "ranking.epochs=0",
    "training.steps=4", "training.batch_size=8", "training.threads_per_worker=1",
)  # fmt: skip
"""Settings of the smallest CTR model."""


def settings(*more: str, of: Sequence[str] = TINY) -> list[str]:
    """Return flags that set `of`, and `more` after it."""
    return [word for setting in (*of, *more) for word in ("--set", setting)]


@dataclass(frozen=True)
class Job:
    """A job's arguments, and how it has to end."""

    words: list[str]
    says: str
    """Part of the last line of its log; of the endpoint's, anywhere in it."""
    ends: str = "SUCCEEDED"
    port: int = 0
    """The port of an endpoint, which is asked and stopped; 0 for a job that ends by itself."""
    path: str = "recall"
    """What an endpoint is asked."""


def script_of(name: str) -> str:
    """Return the job of a name: `serve-ranker` is jobs/serve.py with a ranker."""
    return name.partition("-")[0]


def every_job(out: str) -> dict[str, Job]:
    """Return each job by its name and in order; they read and write below `out`."""
    data, first, results = f"{out}/data", f"{out}/run", f"{out}/results"
    ranker, live, port = f"{out}/ranker", f"{out}/live", free_port()
    return {
        "import_data": Job(["toy_shop", f"{out}/shop.json", data], data),
        "prepare": Job(["--data", data], ""),
        "describe": Job([data], f"page  {data}/"),
        "features": Job([data, "--actors", "2"], ""),
        "train": Job(["--data", data, "--out", first, "--recipe", "karma_text",
                      *settings("training.num_workers=2")], f"jobs/serve.py {first}"),
        "embed": Job([first, "--actors", "2"], ""),
        "index": Job([first], ""),
        "evaluate": Job([first], ""),
        "diagnose": Job([first, "--items", "40"], ""),
        "export_encoder": Job([first, f"{out}/encoder"], ""),
        "codes": Job([first, "--set", "codes.codewords=8", "--set", "codes.fsq_levels=[4,4]"],
                     f"-> {first}/item_codes"),
        "train-ranker": Job(["--data", data, "--out", ranker, "--recipe", "ctr_qarm",
                             "--vectors", first, *settings(of=TINY_RANKER)], ranker),
        "funnel": Job([first, "--clicks", "40", "--cache", f"{out}/cache",
                       *settings(of=TINY_RANKER)], f"report  {first}/funnel/"),
        "tune": Job(["tune_spaces/lambdas.py", "--data", data, "--out", f"{out}/search",
                     "--trials", "2", "--measure-seeds", "1", *settings()],
                    f"best.json --data {data}"),
        "ablate": Job(["baselines", "--rows", "popularity,sasrec", "--seeds", "1", "--data", data,
                       "--results", results, *settings()], f"{results}/"),
        "publish": Job([first, "--to", live], f"jobs/serve.py {live}"),
        "serve": Job([live, "--port", str(port)], "stopping", "STOPPED", port),
        "serve-ranker": Job([first, "--ranker", ranker, "--port", str(port)], "stopping",
                            "STOPPED", port, "rank"),
        "status": Job([first], "Nothing is waited for."),
    }  # fmt: skip


def asked(
    port: int,
    wait_s: float = 0.0,
    starts: Callable[[], bool] = lambda: True,
    path: str = "recall",
) -> dict[str, Any] | None:
    """Return what the endpoint of a local port answers, or None.

    It may take `wait_s` to begin, as long as it `starts`.
    """
    url = f"http://127.0.0.1:{port}/v1/{path}"
    end = time.monotonic() + wait_s
    while True:
        body = json.dumps({"query": "red", "k": 3}).encode()
        try:
            with urllib.request.urlopen(url, body, timeout=30) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except OSError:
            if time.monotonic() >= end or not starts():
                return None
            time.sleep(1.0)


class LocalCluster:
    """`ray start --head` with a job server: loopback, a token, and ports and folders of its own."""

    def __init__(self, folder: Path, num_cpus: int = 4) -> None:
        self._folder, self._num_cpus = folder, num_cpus
        self.port, dashboard, self._agent, self._client = (free_port() for _ in range(4))
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
        flags = ["--submission-id", name, "--working-dir", ".", "--runtime-env-json", PATIENT]
        flags += [] if wait else ["--no-wait"]
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


def submitted(cluster: LocalCluster, name: str, job: Job) -> dict[str, Any]:
    """Submit a job and wait for its end; returns what there is to say, with its log as `log`.

    `wrong` says what was not as it has to be, and is empty if nothing was.
    """
    begun = time.monotonic()
    words = (f"jobs/{script_of(name)}.py", *job.words)
    code, said = cluster.submit(name, *words, wait=not job.port)
    wrong = []
    if job.port:
        states = ("PENDING", "RUNNING")
        answer = asked(job.port, 240.0, lambda: cluster.status(name) in states, job.path)
        wrong += [] if answer and len(answer["items"]) == 3 else [f"answered {answer}"]
        cluster.ray("job", "stop", name)
        wrong += ["still answers after its end"] if asked(job.port) else []
        said = cluster.ray("job", "logs", name).stdout
    ended = cluster.status(name)
    lines = [line for line in said.splitlines() if line.strip()]
    wrong += [] if ended == job.ends else [f"ended as {ended}, not {job.ends}"]
    wrong += [] if (code != 0) == (job.ends == "FAILED") else [f"exit code {code}"]
    where = said if job.port else "".join(lines[-1:])
    wrong += ["a traceback"] if job.ends == "FAILED" and "Traceback" in said else []
    wrong += [] if job.says in where else [f"did not end with {job.says!r}"]
    seconds = round(time.monotonic() - begun, 1)
    return {"job": name, "seconds": seconds, "exit": code, "ended": ended,
            "last": "".join(lines[-1:]), "wrong": wrong, "log": said}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Submit the jobs, and raise KarmaRayError if one ended otherwise than it has to."""
    flags = parser(__doc__ or "")
    flags.add_argument("jobs", metavar="JOB", nargs="*", help="jobs to submit (default: all)")
    flags.add_argument("--out", help="folder of what they write (default: a new temporary one)")
    flags.add_argument(
        "--mistakes", action="store_true", help="let every job read what does not exist"
    )
    arguments = flags.parse_args(argv)
    out = Path(arguments.out or tempfile.mkdtemp(prefix="every-job-")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    (out / "shop.json").write_text(json.dumps(SHOP))
    jobs = every_job(str(out))
    if arguments.mistakes:
        absent = every_job(str(out / "absent"))
        jobs = {name: Job(job.words, "error: ", "FAILED") for name, job in absent.items()}
    for name in arguments.jobs:
        if name not in jobs:
            raise InputError("JOB", name, choices=list(jobs))
    failed = []
    stop_on_signals()  # SIGTERM too ends the cluster
    with LocalCluster(out) as cluster:
        for name in arguments.jobs or jobs:
            found = submitted(cluster, name, jobs[name])
            (out / f"{name}.log").write_text(found.pop("log"))
            failed += [name] if found["wrong"] else []
            print(json.dumps(found), flush=True)
    if failed:
        raise KarmaRayError(f"failed: {', '.join(failed)}; their logs are in {out}")


if __name__ == "__main__":
    run(main)
