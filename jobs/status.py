"""What runs where on the cluster, what is waited for, and what a run has done and cost.

python jobs/status.py [RUN]
ray job submit --working-dir . -- python jobs/status.py s3://BUCKET/runs/first

RUN may also be a search (the --out of jobs/tune.py) or a study (runs/study, or its --results).
Inside `ray job submit`, or with RAY_ADDRESS set, the cluster is asked; otherwise only the run
folder is read. A run notes the machines that are up while it lasts, in RUN/node_hours.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.cli import parser, run
from karma_ray.errors import InputError
from karma_ray.runs.node_hours import read_hours
from karma_ray.studies.progress import told_progress


def main(argv: list[str] | None = None) -> None:
    """Print the state of a run, and of the cluster if there is one."""
    flags = parser(__doc__ or "")
    flags.add_argument("run", metavar="RUN", nargs="?", help="run, search or study")
    arguments = flags.parse_args(argv)
    if arguments.run:
        print("\n".join(told_progress(arguments.run, read_hours(arguments.run))))
    from karma_ray.cluster.session import connect, joins_a_cluster

    if joins_a_cluster():
        from karma_ray.cluster.occupancy import occupancy, screen

        connect()
        print(screen(occupancy()))
    elif arguments.run:
        print("No cluster is asked: RAY_ADDRESS is not set, and this is no submitted job.")
    else:
        message = "is needed without a cluster (RAY_ADDRESS is not set; this is no submitted job)"
        raise InputError("RUN", None, message)


if __name__ == "__main__":
    run(main)
