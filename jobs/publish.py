"""Publish a run: endpoints that serve the live folder answer from it within seconds.

jobs/serve.py LIVE              serves what is live, and follows it
jobs/publish.py RUN --to LIVE   lets RUN be live; model and index change together
"""

from __future__ import annotations

import secrets
import sys
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.artifacts import absolute
from karma_ray.cli import parser, run
from karma_ray.errors import InputError
from karma_ray.serving.publishing import (
    end_arm,
    publish,
    roll_back,
    token_of_environment,
    wait_until_live,
)


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__ or "")
    flags.add_argument("run", metavar="RUN", nargs="?", help="finished run folder, path or URI")
    flags.add_argument(
        "--to", metavar="LIVE",
        help="live folder, path or URI; made if missing (default: live/ beside RUN)",
    )  # fmt: skip
    flags.add_argument("--rollback", action="store_true", help="return to what was live before")
    flags.add_argument(
        "--force", action="store_true", help="publish a run that is worse, or cannot be compared"
    )
    flags.add_argument("--arm", help="for an experiment: the arm whose users RUN answers")
    flags.add_argument(
        "--share", type=float, metavar="PERCENT",
        help="users of the arm, in percent; 0 ends the arm",
    )  # fmt: skip
    flags.add_argument(
        "--endpoint", metavar="URL", help="wait until this endpoint answers with what is live"
    )
    flags.add_argument(
        "--within", type=float, default=120.0, metavar="SECONDS", help="limit of that wait (120)"
    )
    given = flags.parse_args(argv)
    folder = place(given.to, given.run)
    notes: list[str] = []
    if given.rollback:
        if given.run or given.arm:
            raise InputError("--rollback", True, "returns to what was live, and takes no RUN")
        live = roll_back(folder)
    elif given.share == 0 and given.arm and not given.run:
        live = end_arm(folder, given.arm)
    elif given.run:
        live, notes = publish(
            folder, given.run, now=datetime.now(UTC).isoformat(timespec="seconds"),
            fresh=lambda: secrets.token_hex(16), arm=given.arm,
            share=None if given.share is None else given.share / 100, force=given.force,
        )  # fmt: skip
    else:
        raise InputError("RUN", None, "is needed: the run to publish")
    for line in notes:
        print(line)
    rest = 100.0 * (1 - sum(arm.share for arm in live.arms[1:]))
    for number, arm in enumerate(live.arms):
        print(
            f"{arm.arm}: {rest if number == 0 else 100 * arm.share:g} % of users, {arm.run}\n"
            f"  model {arm.model_version}, index {arm.index_version}"
        )
    print(f"live: {folder}; serve it with: python jobs/serve.py {folder}")
    if given.endpoint:
        wait_until_live(given.endpoint, live, given.within, token_of_environment())
        print(f"{given.endpoint} answers with it")


def place(to: str | None, run_uri: str | None) -> str:
    """Return the live folder."""
    if to is None and run_uri is None:
        raise InputError("--to", None, "is needed: the live folder")
    if to is not None and to.startswith(("http://", "https://")):
        raise InputError("--to", to, "must be the live folder that the endpoint serves; name the "
                         "endpoint itself with --endpoint")  # fmt: skip
    return absolute(to or f"{absolute(str(run_uri)).rstrip('/').rpartition('/')[0]}/live")


if __name__ == "__main__":
    run(main)
