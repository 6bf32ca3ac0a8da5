"""Train a recipe: tables (or the built-in toy shop) -> warm-up -> joint training -> metrics.

python jobs/train.py                                     the toy shop, in minutes
python jobs/train.py --data DATA --recipe karma_text     your own logs
python jobs/train.py --data NEW --init-from runs/latest  a finished run's model on new days
ray job submit --working-dir . -- python jobs/train.py --data s3://... --recipe karma_text
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.artifacts import RunFolder
from karma_ray.cli import default_out, load_config, parser, run
from karma_ray.cluster.executor import ON_RAY
from karma_ray.config import override
from karma_ray.report.terminal import summary
from karma_ray.runs.continuation import Parent
from karma_ray.runs.pipeline import train_run


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__, config=True)
    flags.add_argument("--data", help="data folder or URI (default: the built-in toy shop)")
    flags.add_argument("--out", help="run folder or URI (default: runs/<recipe>-<time>)")
    flags.add_argument("--resume", action="store_true", help="continue the unfinished run in --out")
    flags.add_argument(
        "--init-from", metavar="RUN", help="go on with the model (and configuration) of this run"
    )
    flags.add_argument(
        "--profile", action="store_true", help="write a trace of three steps to RUN/profile"
    )
    arguments = flags.parse_args(argv)
    if arguments.init_from and not (arguments.recipe or arguments.config):
        arguments.config = RunFolder(Parent.open(arguments.init_from).run).config
    config = load_config(arguments, "karma_text" if arguments.data else "toy")
    if arguments.profile:
        config = override(config, ["training.profile=true"])
    out = arguments.out or default_out(config.recipe)
    train_run(
        config, arguments.data, out, resume=arguments.resume, init_from=arguments.init_from,
        executor=ON_RAY,
    )  # fmt: skip
    print(summary(out))


if __name__ == "__main__":
    run(main)
