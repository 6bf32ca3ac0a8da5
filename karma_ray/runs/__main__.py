"""Train a recipe in this process, without Ray; flags and run folder as in jobs/train.py.

python -m karma_ray.runs                                   the toy shop, in minutes
python -m karma_ray.runs --data DATA --recipe karma_text   your own logs
"""

from __future__ import annotations

from karma_ray.cli import run, train
from karma_ray.runs.executor import HERE, Executor


def here() -> Executor:
    """Return the executor of this process."""
    return HERE


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, train and print the result."""
    train(argv, __doc__ or "", here)


if __name__ == "__main__":
    run(main)
