"""Reading the files of a log or an item table, in batches or as one frame.

What cannot be read is reported with its file, row and reason: lines with another number of fields,
lines that are no JSON objects or not UTF-8, row groups and files that are damaged.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import polars as pl

from karma_ray.artifacts import data_files, exists, open_filesystem
from karma_ray.data.config import PrepareConfig
from karma_ray.data.event_parts import stamp_of
from karma_ray.data.fragments import folder_columns
from karma_ray.data.importers.delimited import QUOTES
from karma_ray.data.importers.log_formats import ENDINGS, JSON, Rows, kind_of, stream_file
from karma_ray.data.importers.source import with_ids
from karma_ray.data.importers.text_blocks import BLOCK_BYTES, NOT_UTF8, Damaged
from karma_ray.data.reading import Lost, check_lost
from karma_ray.errors import InputError

MAX_BAD_SHARE = PrepareConfig().max_bad_share
"""Largest share of lines of a file that are not UTF-8, and of bytes in damaged files."""
_ENCODING_ADVICE = "--encoding names another one, such as latin-1"


@dataclass(frozen=True)
class TextFormat:
    """How text files are to be read, where the files do not say it."""

    quotes: str = "auto"
    """One of delimited.QUOTES."""
    encoding: str | None = None
    """Name of the encoding; default UTF-8, or UTF-16 if the first bytes show it."""

    def check(self) -> None:
        """Raise InputError on unknown names."""
        if self.quotes not in QUOTES:
            raise InputError("--quotes", self.quotes, choices=QUOTES)
        try:
            codecs.lookup(self.encoding or "utf-8")
        except LookupError:
            raise InputError("--encoding", self.encoding, "is not a known encoding") from None


@dataclass(frozen=True)
class Batch:
    """Rows of one file of a log, in the order of the file."""

    file: str
    frame: pl.DataFrame
    """The columns of the file and its folders, `row` (below the header) and `source_file`."""
    rejected: list[tuple[str, pl.DataFrame]]
    """Reason, and a frame with `row` and what could not be read as a row."""
    may_lack: bool
    """Whether columns may be missing because no row of the batch has a value (JSON lines)."""


class LogFiles:
    """A file, or a folder of files, read in batches whose size does not show in the rows.

    CSV, TSV and JSON values stay strings. The columns `ids` become text in each batch, because a
    type common to all files would round them. Columns may be in any order, and folders may name
    some (`dt=2024-05-01/`). Columns that are not `needed` may be missing in some files.
    """

    def __init__(
        self,
        uri: str,
        field: str,
        *,
        ids: Iterable[str] = (),
        needed: Iterable[str] = (),
        form: TextFormat | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """Raise InputError, which names `field`, if there is no such file."""
        if not exists(uri):
            raise InputError(field, uri, "does not exist")
        fs, self.root = open_filesystem(uri)
        self._files = data_files(uri, ENDINGS)
        if not self._files:
            raise InputError(field, uri, "is no such file nor a folder of them", choices=ENDINGS)
        self._remote = "://" in uri
        infos = {self._uri(fs, name): fs.info(name) for name in self._files}
        self._sizes = {file: int(info["size"]) for file, info in infos.items()}
        self.stamps = {file: stamp_of(info) for file, info in infos.items()}
        """Of every file; another content has another stamp."""
        self.uri, self.field = uri, field
        self._ids, self._needed = list(ids), list(needed)
        self.form, self._block_bytes = form or TextFormat(), block_bytes
        self._have: dict[str, list[str]] = {}
        self.notes: list[str] = []
        """Notes for the manifest on how the files were read, complete after the last batch."""

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(self._sizes.values())

    @property
    def files(self) -> list[str]:
        """The files that have something to read, in their order; raises InputError if none has."""
        # Workers without rows write empty files.
        found = [file for file, size in self._sizes.items() if size or len(self._sizes) == 1]
        if not found:
            raise InputError(self.field, self.uri, "has only empty files")
        return found

    def batches(self) -> Iterator[Batch]:
        """Yield the rows of all files; raises what `read` and `check_lost` raise."""
        lost: list[Lost] = []
        for file in self.files:
            yield from self.read(file, lost, self.notes)
        self.check_lost(lost)

    def first_batch(self) -> Batch | None:
        """Read the first rows with all columns, with which `read` compares those of other files.

        Returns None of a log of JSON lines, as these may omit some.
        """
        for file in self.files:
            if kind_of(file) not in JSON:
                for batch in self.read(file, [], []):
                    if self._have:
                        return batch
        return None

    def check_lost(self, lost: Iterable[Lost]) -> None:
        """Raise TooManyBadRows if too much of all files is damaged."""
        check_lost(lost, self._sizes, MAX_BAD_SHARE, self.field)

    def _uri(self, fs: object, name: str) -> str:
        return str(fs.unstrip_protocol(name)) if self._remote else name  # type: ignore[attr-defined]

    def read(self, file: str, lost: list[Lost], notes: list[str]) -> Iterator[Batch]:
        """Yield the rows of a file; what is lost, and notes for the manifest, are added.

        Raises InputError on a file that cannot be read at all, on columns that only some files
        have and on ids that are already rounded.
        """
        lines, undecoded, seen = 0, 0, False
        try:
            parts = stream_file(file, self.form.quotes, self.form.encoding, self._block_bytes)
            for part in parts:
                lost += part.lost
                notes += [f"{self.field}: {note}" for note in part.notes]
                lines += part.num_lines
                undecoded += sum(rows.height for why, rows in part.rejected if why == NOT_UTF8)
                rejected = [*part.rejected, *(_rejected(one) for one in part.lost)]
                batch = self._batch(file, part, rejected)
                seen = seen or part.frame.width > 1
                if part.lost and len(self._sizes) == 1 and part.lost[0].row is None:
                    raise Damaged(part.lost[0].error)
                yield batch
        except UnicodeError as error:
            problem = f"cannot be read ({error}); {_ENCODING_ADVICE}"
            raise InputError(self.field, file, problem) from None
        except pl.exceptions.PolarsError as error:
            if len(self._sizes) == 1 or not isinstance(error, pl.exceptions.NoDataError):
                raise InputError(self.field, file, f"cannot be read ({error})") from None
        except Damaged as damage:
            if not seen and len(self._sizes) == 1:
                raise InputError(self.field, file, f"cannot be read ({damage})") from None
            one = Lost(file, None, None, 0.0 if seen else 1.0, str(damage))
            lost.append(one)
            yield self._batch(file, Rows(pl.DataFrame(schema={"row": pl.Int64})), [_rejected(one)])
        if undecoded > MAX_BAD_SHARE * lines:
            problem = f"cannot be read: {undecoded} of {lines} lines are not UTF-8"
            raise InputError(self.field, file, f"{problem}; {_ENCODING_ADVICE}")

    def _batch(self, file: str, part: Rows, rejected: list[tuple[str, pl.DataFrame]]) -> Batch:
        frame, path = part.frame, open_filesystem(file)[1]
        if frame.width > 1:
            columns = folder_columns(path, self.root) if path != self.root else {}
            further = [pl.lit(v).alias(c) for c, v in columns.items() if c not in frame.columns]
            frame = with_ids(frame.with_columns(further), self._ids, file)
            if kind_of(file) not in JSON:
                self._check_same(file, frame.columns)
        source = pl.lit(file).alias("source_file")
        return Batch(file, frame.with_columns(source), rejected, kind_of(file) in JSON)

    def _check_same(self, file: str, columns: list[str]) -> None:
        """Raise InputError if a needed column is in one file but not in another.

        JSON lines omit keys without a value, so files of this kind may lack some.
        """
        if file in self._have:
            return
        self._have[file] = columns
        first = next(iter(self._have))
        for column in self._needed:
            have = [name for name in (first, file) if column in self._have[name]]
            if len(have) == 1 and first != file:
                lacks = file if have[0] == first else first
                raise InputError(
                    self.field, lacks, f"lacks the column {column!r}, which {have[0]} has; columns",
                    [c for c in self._have[lacks] if c != "row"],
                )  # fmt: skip


def _rejected(lost: Lost) -> tuple[str, pl.DataFrame]:
    schema = {"row": pl.Int64, "rows": pl.Int64, "error": pl.String}
    return lost.reason, pl.DataFrame([(lost.row, lost.num_rows, lost.error)], schema, orient="row")


@dataclass(frozen=True)
class ReadRows:
    """The rows of one or several files of the same kind."""

    frame: pl.DataFrame
    """The columns of the files, `row` (the number below the header) and `source_file`."""
    rejected: list[tuple[str, str, pl.DataFrame]]
    """File, reason, and a frame with `row` and `line` of what could not be read as a row."""
    notes: list[str]
    """Notes for the manifest on how the files were read."""


def read_files(
    uri: str,
    field: str,
    *,
    ids: Iterable[str] = (),
    needed: Iterable[str] = (),
    form: TextFormat | None = None,
) -> ReadRows:
    """Read all batches of `LogFiles` into one frame; raises what it raises."""
    files = LogFiles(uri, field, ids=ids, needed=needed, form=form)
    frames: list[pl.DataFrame] = []
    rejected: list[tuple[str, str, pl.DataFrame]] = []
    for batch in files.batches():
        if batch.frame.width > 2:
            frames.append(batch.frame)
        rejected += [(batch.file, reason, bad) for reason, bad in batch.rejected if len(bad)]
    try:
        frame = pl.concat(frames, how="diagonal_relaxed")
    except pl.exceptions.PolarsError as error:
        raise InputError(field, uri, f"has files with different columns ({error})") from None
    return ReadRows(frame, rejected, files.notes)
