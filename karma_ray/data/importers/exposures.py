"""The rows of a log, read file by file: columns by our names, parsed, and bad rows apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import polars as pl

from karma_ray.data.identifiers import known_text
from karma_ray.data.importers.log_files import Batch, LogFiles, TextFormat
from karma_ray.data.importers.long_parsing import flag, timestamp
from karma_ray.data.importers.output import NO_ROWS, rejected_rows
from karma_ray.data.reading import Lost
from karma_ray.errors import InputError

REQUIRED = ("user_id", "item_id", "timestamp")
OPTIONAL = ("query", "clicked", "purchased", "position", "impression_id", "session_id")
NO_TIME = "unparsable timestamp"
TIME_ADVICE = "--time-format states how times are written, for example %m/%d/%Y or %Y%m%d"
MAX_QUERY = 10_000
"""Characters of a query; longer ones are documents or several rows that a quote has joined."""
OVERLONG_QUERY = f"query of more than {MAX_QUERY} characters"
BY_ROW = "row"
"""A timestamp mapped to this, in a log that has no such column, numbers the rows of a user."""
_IDS = ("user_id", "item_id", "impression_id", "session_id")
_FLAGS = ("clicked", "purchased")
_AND = "+"

TIME_US = pl.Datetime("us", "UTC")
EXPOSURES: dict[str, pl.DataType] = {
    "user_id": pl.String(), "item_id": pl.String(), "timestamp": TIME_US, "query": pl.String(),
    "clicked": pl.Boolean(), "purchased": pl.Boolean(), "position": pl.Float64(),
    "impression_id": pl.String(), "session_id": pl.String(), "order": pl.Int64(),
}  # fmt: skip
"""The columns of exposures, in which a column that the log lacks is null."""


@dataclass
class LogFacts:
    """What is known of the rows of a file, or of several files in their order."""

    num_rows: int = 0
    """Number of rows that could be read."""
    num_places: int = 0
    """Number of rows that are counted in `order`, also those that are quarantined."""
    newest: int | None = None
    """The latest time in microseconds."""
    names: list[str] = field(default_factory=list)
    """Our names of the columns that there are."""
    columns: list[str] = field(default_factory=list)
    """The columns that there are."""
    notes: list[str] = field(default_factory=list)
    """Notes for the manifest on how the files were read."""
    lost: list[Lost] = field(default_factory=list)
    """Rows of damaged files."""

    def add(self, later: LogFacts) -> None:
        """Add what is known of the next file."""
        self.num_rows += later.num_rows
        self.num_places += later.num_places
        self.see_time(later.newest)
        self.see(later.names, later.columns)
        self.notes += later.notes
        self.lost += later.lost

    def see_time(self, time: int | None) -> None:
        """Take a time that may be the newest."""
        if time is not None and (self.newest is None or time > self.newest):
            self.newest = time

    def see(self, names: Iterable[str], columns: Iterable[str]) -> None:
        """Add names and columns that are not known yet."""
        self.names = list(dict.fromkeys([*self.names, *names]))
        self.columns = list(dict.fromkeys([*self.columns, *columns]))

    def to_json(self) -> dict[str, Any]:
        """Return them as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LogFacts:
        """Read what `to_json` returned."""
        return cls(**{**value, "lost": [Lost(**one) for one in value["lost"]]})


class Exposures:
    """The exposures of a log, which each task reads a file of."""

    def __init__(
        self,
        src: str,
        columns: Mapping[str, str],
        form: TextFormat,
        time_format: str | None,
        block_bytes: int,
    ) -> None:
        """Raise InputError if there is no such log."""
        ids = [columns.get(name, name) for name in _IDS]
        named = (columns.get(name, name) for name in REQUIRED + OPTIONAL)
        needed = [part for name in named for part in _parts(name)]
        self.files = LogFiles(
            src, "SRC", ids=ids, needed=needed, form=form, block_bytes=block_bytes
        )
        self._columns, self._time_format = dict(columns), time_format

    @property
    def by_row(self) -> bool:
        """Whether times are unknown, so that the rows of each user are numbered instead."""
        return self._columns.get("timestamp") == BY_ROW

    def key(self) -> list[Any]:
        """Return what the rows of a file depend on beside its content, as JSON values.

        The columns of the first file are a part, as another file is refused that has others.
        Raises InputError on columns that it lacks.
        """
        first, files = self.files.first_batch(), self.files
        names = [] if first is None else [n for n in EXPOSURES if n in self._mapped(first).columns]
        alone = len(files.stamps) == 1
        return [files.root, alone, names, self._columns, asdict(files.form), self._time_format]

    def read(self, file: str, facts: LogFacts) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
        """Yield exposures (EXPOSURES), and the QUARANTINE of rows, in the order of the file.

        What is known of them is added to `facts`. Raises InputError on columns that do not exist,
        which JSON lines may omit: `check` finds them.
        """
        for batch in self.files.read(file, facts.lost, facts.notes):
            rejected = [NO_ROWS]
            rejected += [rejected_rows(rows, batch.file, why) for why, rows in batch.rejected]
            frame = batch.frame
            kept = pl.DataFrame(schema=EXPOSURES)
            if frame.width > 2:  # not only the row and the file
                log = self._mapped(batch)
                facts.see((n for n in (*REQUIRED, *OPTIONAL) if n in log.columns), frame.columns)
                kept, bad = self._readable(log)
                kept = _filled(kept, facts.num_places)
                rejected.append(bad)
                facts.num_places += frame.height
                facts.num_rows += kept.height
                facts.see_time(kept.select(pl.col("timestamp").to_physical().max()).item())
            yield kept, pl.concat(rejected).sort("row", maintain_order=True)

    def check(self, facts: LogFacts) -> None:
        """Raise TooManyBadRows on too much damage, and InputError on a column that no file has."""
        self.files.check_lost(facts.lost)
        if facts.columns:
            self._map(pl.DataFrame(schema=dict.fromkeys(facts.columns, pl.String)))

    def _mapped(self, batch: Batch) -> pl.DataFrame:
        frame = batch.frame
        if batch.may_lack:
            wanted = [self._columns.get(name, name) for name in REQUIRED]
            wanted += self._columns.values()
            lacking = {part for name in wanted for part in _parts(name)} - {*frame.columns}
            lacking -= {BY_ROW}
            frame = frame.with_columns(pl.lit(None, pl.String).alias(name) for name in lacking)
        return self._map(frame)

    def _map(self, frame: pl.DataFrame) -> pl.DataFrame:
        columns, have = dict(self._columns), [c for c in frame.columns if c != "source_file"]
        for name in _FLAGS:
            column = columns.get(name, "")
            if _AND in column and column not in have and {*_parts(column)} <= {*have}:
                flags = [flag(part, frame.schema[part]) for part in _parts(column)]
                # As text, so that a value which cannot be read stays one.
                some = pl.any_horizontal(flags).cast(pl.String).fill_null("unreadable")
                frame = frame.with_columns(some.alias(column))
        if self.by_row:
            # The readers' own `row` is the number in a file; a column of that name is not kept.
            columns.pop("timestamp")
            frame = frame.with_columns(pl.lit(0).alias("timestamp"))
        return map_columns(frame, columns, "--columns", REQUIRED, OPTIONAL)

    def _readable(self, log: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Return parsed exposures, and the rows that cannot be parsed, unchanged."""
        schema = log.schema
        parsed = [pl.col(name).alias(f"_{name}") for name in _IDS if name in schema]
        if "query" in schema:
            parsed.append(known_text("query").alias("_query"))
        time = timestamp("timestamp", schema["timestamp"], self._time_format)
        parsed.append(time.alias("_timestamp"))
        flags = [name for name in _FLAGS if name in schema]
        parsed += [flag(name, schema[name]).alias(f"_{name}") for name in flags]
        if "position" in schema:
            number = pl.col("position").cast(pl.Float64, strict=False).fill_nan(None)
            parsed.append(number.alias("_position"))
        reasons = {
            "null user": pl.col("_user_id").is_null(),
            "null item": pl.col("_item_id").is_null(),
            NO_TIME: pl.col("_timestamp").is_null(),
        }
        if "query" in schema:
            reasons[OVERLONG_QUERY] = pl.col("_query").str.len_chars() > MAX_QUERY
        reasons |= {f"unparsable {name}": pl.col(f"_{name}").is_null() for name in flags}
        numbered = log.with_columns(*parsed, pl.int_range(pl.len()).alias("_order"))
        kept, rejected = filter_rows(numbered, reasons)
        names = [name for name in kept.columns if name.startswith("_")]
        ours = [pl.col(name).alias(name[1:]) for name in names if name[1:] in EXPOSURES]
        return kept.select(ours), rejected


def _parts(column: str) -> list[str]:
    return column.split(_AND)


def _filled(rows: pl.DataFrame, order: int) -> pl.DataFrame:
    """Return the columns EXPOSURES, with nulls in those that the rows lack."""
    lacking = [name for name in EXPOSURES if name not in rows.columns]
    filled = rows.with_columns(pl.lit(None, EXPOSURES[name]).alias(name) for name in lacking)
    time = pl.col("timestamp").cast(TIME_US)
    return filled.with_columns(time, pl.col("order") + order).select(*EXPOSURES)


def map_columns(
    frame: pl.DataFrame,
    mapping: Mapping[str, str],
    field: str,
    required: Iterable[str],
    optional: Iterable[str],
) -> pl.DataFrame:
    """Rename mapped columns to our names; raises InputError on columns that do not exist."""
    ours = [*required, *optional]
    have = [c for c in frame.columns if c not in ("row", "source_file")]
    for name, column in mapping.items():
        if name not in ours:
            raise InputError(field, name, "is not one of our column names", choices=ours)
        if column not in have:
            raise InputError(f"{field} {name}", column, "is not a column of the file", have)
    for name in {*ours} & {*have} | {*mapping}:
        kind = frame.schema[mapping.get(name, name)]
        if kind.is_nested():
            raise InputError(f"{field} {name}", str(kind), "is not a single value")
    for name in required:
        if name not in mapping and name not in have:
            raise InputError(f"{field} {name}", None, "is needed; columns of the file", have)
    # A mapped column replaces another one that already has our name.
    hidden = [name for name, column in mapping.items() if name in have and column != name]
    taken = [pl.col(column).alias(name) for name, column in mapping.items()]
    rest = [c for c in frame.columns if c not in mapping.values() and c not in hidden]
    return frame.select(*taken, *rest)


def filter_rows(
    frame: pl.DataFrame, reasons: Mapping[str, pl.Expr]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the rows for which no reason holds, and the QUARANTINE of the others, in order."""
    rejected = [NO_ROWS]
    shown = [c for c in frame.columns if c != "image" and not c.startswith("_")]
    for reason, bad in reasons.items():
        for (file,), rows in frame.filter(bad).group_by("source_file", maintain_order=True):
            rejected.append(
                rejected_rows(rows.select(shown).drop("source_file"), str(file), reason)
            )
        frame = frame.filter(~bad.fill_null(False))
    return frame, pl.concat(rejected)
