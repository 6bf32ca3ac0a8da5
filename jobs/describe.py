"""Describe a data folder: users, items, histories, exposures, time, queries and what was set aside.

python jobs/describe.py DATA                     a summary, and DATA/description.html
python jobs/describe.py DATA --out FOLDER        the page and description.json go to FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.cli import parser, run
from karma_ray.data.description import describe
from karma_ray.report.data_page import data_screen, render_data_page


def main(argv: list[str] | None = None) -> None:
    """Print the summary and write the page."""
    flags = parser(__doc__ or "")
    flags.add_argument("data", metavar="DATA", help="data folder or URI, prepared or not")
    flags.add_argument("--out", metavar="URI", help="folder of the page (default: DATA)")
    arguments = flags.parse_args(argv)
    numbers = describe(arguments.data)
    page = render_data_page(numbers, arguments.out or arguments.data)
    print(f"{data_screen(numbers)}\n\npage  {page}")


if __name__ == "__main__":
    run(main)
