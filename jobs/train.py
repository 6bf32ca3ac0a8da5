"""Train a recipe on tables or the built-in toy shop: warm-up, joint training, index and metrics.

python jobs/train.py                                     the toy shop, in minutes
python jobs/train.py --data DATA --recipe karma_text     your own logs
python jobs/train.py --data NEW --init-from runs/latest  a finished run's model on new days
ray job submit --working-dir . -- python jobs/train.py --data s3://... --recipe karma_text
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.cli import run, train

if TYPE_CHECKING:
    from karma_ray.runs.executor import Executor


def on_ray() -> Executor:
    from karma_ray.cluster.executor import ON_RAY

    return ON_RAY


def main(argv: list[str] | None = None) -> None:
    train(argv, __doc__, on_ray)


if __name__ == "__main__":
    run(main)
