r"""Import a public data set, any log with a row per exposure, or a toy shop into a data folder.

python jobs/import_data.py hm hm/ DATA
python jobs/import_data.py long log.csv DATA --columns user_id=uid,item_id=sku,timestamp=ts \
    --items items.csv --item-columns item_id=sku,title=name
python jobs/import_data.py toy_shop few_users.json DATA     # {"num_users": 1000}: docs/toy-shop.md
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray import cli
from karma_ray.cluster.sharding import run_on_ray
from karma_ray.data.config import PrepareConfig
from karma_ray.data.importers.delimited import QUOTES
from karma_ray.data.importers.log_files import TextFormat
from karma_ray.data.importers.long import import_long, parse_mapping
from karma_ray.data.importers.registry import FORMATS, importer
from karma_ray.errors import InputError


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Import and print a one-screen summary; returns the manifest."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("format", metavar="FORMAT", help="one of: " + ", ".join(FORMATS))
    parser.add_argument(
        "src", metavar="SRC", help="folder (long: file or folder; toy_shop: JSON file) to read"
    )
    parser.add_argument("out", metavar="OUT", help="data folder to write, path or URI")
    parser.add_argument("--seed", type=int, default=0, help="seed of drawn negatives (default 0)")
    parser.add_argument(
        "--columns", default="", metavar="OURS=THEIRS,...",
        help="long: user_id, item_id, timestamp and optionally query, clicked, purchased, "
        "position, impression_id, session_id",
    )  # fmt: skip
    parser.add_argument("--items", metavar="FILE", help="long: the table of items")
    parser.add_argument(
        "--item-columns", default="", metavar="OURS=THEIRS,...",
        help="long: item_id, title and optionally text, brand, category, image",
    )  # fmt: skip
    parser.add_argument(
        "--quotes", choices=QUOTES, default="auto",
        help="long: whether a quote in CSV and TSV encloses a field (csv) or is an ordinary "
        "character (text); auto: text for TSV, and for CSV as its lines suggest (default auto)",
    )  # fmt: skip
    parser.add_argument(
        "--encoding", metavar="NAME", help="long: encoding of CSV, TSV and JSON lines, for example "
        "latin-1 (default: UTF-8, or UTF-16 if the file begins like it)",
    )  # fmt: skip
    parser.add_argument(
        "--time-format", metavar="FORMAT", help="long: how timestamps are written, for example "
        "%%m/%%d/%%Y; not needed for ISO 8601 and epoch numbers",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    if arguments.format == "long":
        manifest = import_long(
            arguments.src,
            arguments.out,
            items=arguments.items,
            columns=parse_mapping(arguments.columns, "--columns"),
            item_columns=parse_mapping(arguments.item_columns, "--item-columns"),
            form=TextFormat(arguments.quotes, arguments.encoding),
            time_format=arguments.time_format,
            seed=arguments.seed,
            run=run_on_ray,
        )
    else:
        run = importer(arguments.format)
        for flag in ("columns", "items", "item_columns", "encoding", "time_format"):
            if value := getattr(arguments, flag):
                name = "--" + flag.replace("_", "-")
                raise InputError(name, value, "is only for the format long")
        manifest = run(arguments.src, arguments.out, seed=arguments.seed)
    print(summary(manifest, arguments.out, time.perf_counter() - started))
    return manifest


def summary(manifest: dict[str, Any], out: str, seconds: float) -> str:
    """Return what was imported, what was left out, and the next command."""
    lines = [f"imported {manifest['name']} into {out} in {seconds:.1f} s"]
    counts = manifest["counts"]
    lines += [f"  {name.replace('_', ' '):<22}{count:>12,}" for name, count in counts.items()]
    quarantined = manifest["quarantined"]
    lines.append(f"  {'quarantined rows':<22}{sum(quarantined.values()):>12,}")
    lines += [f"    {reason}: {count:,}" for reason, count in quarantined.items()]
    lines.append(f"  queries: {manifest['query_source'].upper()}")
    lines.append(f"  negatives: {manifest['negative_source'].upper()}")
    lines += [f"  - {note}" for note in manifest["notes"]]
    lines.append(f"  licence: {manifest['licence']}")
    return "\n".join([*lines, *_next(counts, out)])


def _next(counts: dict[str, int], out: str) -> list[str]:
    """Return the next command, and what must be corrected first if preparation would refuse."""
    unknown, train = counts.get("clicks_on_unknown_items", 0), f"--data {shlex.quote(out)}"
    if counts.get("clicks", counts.get("training_clicks", 0)) == unknown:
        return ["no click names a known item, so nothing can be trained on this folder"]
    train = f"python jobs/train.py {train} --recipe karma_text"
    allowed = PrepareConfig().max_bad_share
    bad, pages = counts.get("pages_with_unknown_clicks", 0), counts.get("events", 0)
    if bad <= allowed * pages:
        return [f"next: {train}"]
    return [
        f"{bad:,} of {pages:,} pages have clicks on items that the item table lacks; preparation "
        f"allows {allowed:.0%}",
        "next: import again with a more complete --items, or train without these clicks:",
        f"  {train} --set prepare.max_bad_share={math.ceil(100 * bad / pages) / 100:g}",
    ]


if __name__ == "__main__":
    cli.run(main)
