"""Parsing of delimited text into rows of strings; a malformed line never affects other lines.

A line is a row if it has as many fields as the header. Quotes are treated in one of three ways:

text    a quote is an ordinary character, and every row is a line
csv     a field may be quoted, and may then contain separators, `""` for a quote, and line ends
auto    `text` for TSV, whose exports are usually unquoted, unless its header is quoted; otherwise
        `csv`, but an opening quote joins lines only if they are not all rows by themselves: in a
        log, `"big lamp` is a query as typed, and the next lines are clicks of other users
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

QUOTES = ("auto", "text", "csv")
_MAX_JOINED = 1_000
"""Largest number of lines in one quoted field."""


@dataclass(frozen=True)
class Delimited:
    """The rows below the header; `row` counts lines from 0."""

    frame: pl.DataFrame
    """The header's columns as strings, and `row`."""
    rejected: pl.DataFrame
    """`row` and `line` of every line whose number of fields differs from the header's."""
    joined: int
    """Rows that span several lines."""
    literal: int
    """Number of rows with a quote that is not part of a quoted field and was kept unchanged."""


def separator_of(header: str, default: str) -> str:
    """Return the separator of a header: `default` if it occurs, else the most frequent one."""
    bare = re.sub('"[^"]*"', "", header)
    candidates = [default, ";", "\t", "|", ","]
    return default if default in bare else max(candidates, key=bare.count)


def read_delimited(text: str, separator: str, quotes: str = "auto") -> Delimited:
    """Parse `text`; `quotes` is one of QUOTES. Raises polars' errors on an empty text."""
    if "\n" not in text:
        text = text.replace("\r", "\n")  # line ends of old spreadsheets
    lines = pl.select(pl.lit(text).str.split("\n").explode()).to_series()
    lines = lines.str.strip_chars_end("\r").alias("line")
    filled = np.flatnonzero((lines.str.len_bytes() > 0).to_numpy())
    if not len(filled):
        raise pl.exceptions.NoDataError("it is empty")
    header, body = str(lines[int(filled[0])]), lines.gather(filled[1:])
    return DelimitedReader(header, separator, quotes).read(body, filled[1:] - filled[0] - 1)


class DelimitedReader:
    """Parses the lines below a header, all at once or block by block."""

    def __init__(self, header: str, separator: str, quotes: str = "auto") -> None:
        if quotes == "auto" and separator == "\t" and not header.startswith('"'):
            quotes = "text"
        self._grammar, self._quotes = _Grammar(separator), quotes
        fields = header.split(separator) if quotes == "text" else self._grammar.fields(header)
        self._names = _distinct(fields)
        self._lines = pl.Series("line", [], pl.String)
        self._rows = np.zeros(0, np.int64)

    @property
    def waiting(self) -> int | None:
        """Number of the first line that waits for the next block, or None."""
        return int(self._rows[0]) if len(self._rows) else None

    def read(self, lines: pl.Series, rows: np.ndarray, *, last: bool = True) -> Delimited:
        """Parse `lines`, none of them empty, whose numbers are `rows`.

        Unless it is the `last` block, an opening quote near its end waits with all that follows
        for the next block, so that the blocks do not show in what is read.
        """
        body = pl.concat([self._lines, lines.alias("line")])
        rows = np.concatenate([self._rows, rows])
        names, separator = self._names, self._grammar.separator
        if self._quotes == "text":
            odd = _Odd(len(body))
            counts = body.str.count_matches(separator, literal=True)
            plain = (counts == len(names) - 1).to_numpy()
        else:
            plain = self._grammar.well_formed(body, len(names))
            join_rows = self._quotes == "csv"
            odd = _read_odd(body, plain, self._grammar, len(names), join_rows=join_rows, last=last)
        self._lines, self._rows = body.slice(odd.stop), rows[odd.stop :]
        body, rows, plain = body.head(odd.stop), rows[: odd.stop], plain[: odd.stop]
        taken = np.zeros(len(body), bool)
        taken[odd.lines] = True
        bad, plain = ~plain & ~taken, plain & ~taken
        quote = None if self._quotes == "text" else '"'
        frame = _parse(body.filter(plain), names, separator, quote)
        mended = pl.DataFrame(odd.rows, dict.fromkeys(names, pl.String), orient="row")
        mended = mended.with_columns(pl.col(names).replace("", None))
        parts = [
            part.with_columns(pl.Series("row", numbers, pl.Int64))
            for part, numbers in ((frame, rows[plain]), (mended, rows[odd.starts]))
        ]
        rejected = pl.DataFrame([pl.Series("row", rows[bad], pl.Int64), body.filter(bad)])
        return Delimited(pl.concat(parts).sort("row"), rejected, odd.joined, odd.literal)


class _Grammar:
    """Parses lines of fields between separators, some of which may be quoted."""

    def __init__(self, separator: str) -> None:
        self.separator, mark = separator, re.escape(separator)
        quoted, bare = '"[^"]*(?:""[^"]*)*"', f'[^"{mark}]*'
        either = f"(?:{quoted}|{bare})"
        self._quoted = quoted
        self._row = f"^{either}(?:{mark}{either})*$"
        self._whole = re.compile(f"{either}(?:{mark}{either})*")
        self._open = re.compile(f'(?:{either}{mark})*"[^"]*(?:""[^"]*)*')
        self._field = re.compile(f"(?:({quoted})|([^{mark}]*))(?:{mark}|$)", re.DOTALL)

    def well_formed(self, lines: pl.Series, num_fields: int) -> np.ndarray:
        """Return the mask [lines] of lines that are valid CSV rows by themselves."""
        found = self._counts(lines, num_fields)
        quoted = lines.str.contains('"', literal=True).to_numpy()
        if quoted.any():  # only these need the slower look
            some = lines.filter(quoted)
            bare = some.str.replace_all(self._quoted, "")
            valid = some.str.contains(self._row).to_numpy()
            found[quoted] = self._counts(bare, num_fields) & valid
        return found

    def _counts(self, lines: pl.Series, num_fields: int) -> np.ndarray:
        counts = lines.str.count_matches(self.separator, literal=True)
        return np.array(counts == num_fields - 1, bool)

    def fields(self, line: str) -> list[str]:
        """Split a line into fields; well-formed quotes are removed, others stay."""
        found, place = [], 0
        while place <= len(line):
            match = self._field.match(line, place)
            assert match is not None, "the second alternative always matches"
            quoted, bare = match.groups()
            found.append(bare if quoted is None else quoted[1:-1].replace('""', '"'))
            if match.end() == len(line) and not match.group().endswith(self.separator):
                break
            place = match.end()
        return found

    def joined(
        self, lines: pl.Series, start: int, num_fields: int, *, last: bool
    ) -> list[str] | None:
        """Return the lines from `start` that a quoted field joins to one row, or None.

        Raises EOFError where only lines after these can tell, unless these are the last.
        """
        part: list[str] = []
        for number in range(start, min(len(lines), start + _MAX_JOINED)):
            part.append(lines[number])
            if len(part) > 1 and '"' not in part[-1]:
                continue
            text = "\n".join(part)
            if len(part) > 1 and self._whole.fullmatch(text):
                return part if len(self.fields(text)) == num_fields else None
            if not self._open.fullmatch(text):
                return None
        if not last and len(lines) < start + _MAX_JOINED:
            raise EOFError
        return None


@dataclass
class _Odd:
    """Rows that were read from lines that are not valid CSV rows by themselves."""

    stop: int
    """Number of lines that were read; those after them wait for more."""
    rows: list[list[str]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    joined: int = 0
    literal: int = 0


def _read_odd(
    body: pl.Series,
    plain: np.ndarray,
    grammar: _Grammar,
    num_fields: int,
    *,
    join_rows: bool,
    last: bool,
) -> _Odd:
    odd, quoted = _Odd(len(body)), body.str.contains('"', literal=True).to_numpy()
    stop = 0
    for number in np.flatnonzero(~plain & quoted).tolist():
        if number < stop:
            continue
        try:
            part = grammar.joined(body, number, num_fields, last=last) or []
        except EOFError:
            odd.stop = number
            break
        if part and not join_rows and all(len(grammar.fields(p)) == num_fields for p in part):
            part = []  # each is a row on its own
        fields = grammar.fields("\n".join(part) if part else body[number])
        if len(fields) != num_fields:
            continue
        stop = number + max(1, len(part))
        odd.rows.append(fields)
        odd.starts.append(number)
        odd.lines += range(number, stop)
        odd.joined += bool(part)
        odd.literal += not part
    return odd


def _parse(lines: pl.Series, names: list[str], separator: str, quote: str | None) -> pl.DataFrame:
    if lines.is_empty():
        return pl.DataFrame(schema=dict.fromkeys(names, pl.String))
    source = io.BytesIO(lines.str.join("\n").item().encode())
    return pl.read_csv(
        source, separator=separator, quote_char=quote, has_header=False, new_columns=names,
        infer_schema=False,
    )  # fmt: skip


def _distinct(names: Sequence[str]) -> list[str]:
    """Make names unique by appending a number to repeated ones."""
    seen: dict[str, int] = {}
    made = []
    for name in names:
        seen[name] = seen.get(name, -1) + 1
        made.append(f"{name}_{seen[name]}" if seen[name] else name)
    return made
