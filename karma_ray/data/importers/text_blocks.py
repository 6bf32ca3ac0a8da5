"""Text files read in blocks of whole lines, so that memory does not grow with the file.

Lines are told apart by their number in the file, and what the blocks are does not show in anything
that is read. A line that is not UTF-8 is reported and costs no other line.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl

from karma_ray.artifacts import open_filesystem

BLOCK_BYTES = 1 << 24
NOT_UTF8 = "not UTF-8"
_PROBE = 1 << 20
"""Bytes at the start of a file that show its encoding and its line ends."""
_BROKEN = (gzip.BadGzipFile, EOFError, zlib.error)
"""What a damaged archive raises. A store that cannot be reached raises other errors."""


class Damaged(Exception):
    """The file cannot be read further; what was read before it stays valid."""


@dataclass(frozen=True)
class Block:
    """Whole lines of a file, without their ends."""

    first: int
    """Number of the first line in the file, from 0."""
    lines: pl.Series
    """The lines; null where a line is not UTF-8."""
    bad: pl.DataFrame
    """`row` (the number in the file) and `line` (escaped) of the lines that are not UTF-8."""


def stream_blocks(
    uri: str, encoding: str | None = None, block_bytes: int = BLOCK_BYTES
) -> Iterator[Block]:
    """Yield the lines of a text file, compressed if its name ends in `.gz`.

    The encoding is UTF-8, or UTF-16 if the first bytes show it, unless one is named. Raises
    Damaged after the last line that can be read, and UnicodeError on a text that is not in the
    encoding that was named.
    """
    first = 0
    for content in _whole_lines(_utf8(uri, encoding, block_bytes)):
        block = _block(content, first)
        first += len(block.lines)
        yield block


def _utf8(uri: str, encoding: str | None, block_bytes: int) -> Iterator[bytes]:
    """Yield the content as UTF-8 without a mark at its start, with line ends of one kind."""
    probe = b""
    decoder: Any = None
    old_ends = False
    for number, piece in enumerate(_pieces(uri, block_bytes)):
        if number == 0:
            probe = piece[:_PROBE]
            name = encoding or _encoding(probe)
            if codecs.lookup(name).name != "utf-8":
                decoder = codecs.getincrementaldecoder(name)()
            elif piece.startswith(codecs.BOM_UTF8):
                piece = piece[len(codecs.BOM_UTF8) :]
        text = piece if decoder is None else decoder.decode(piece).encode()
        if number == 0:
            text = text.removeprefix(codecs.BOM_UTF8)
            old_ends = b"\n" not in text[:_PROBE]  # of old spreadsheets
        yield text.replace(b"\r", b"\n") if old_ends else text
    if decoder is not None:
        yield decoder.decode(b"", final=True).encode()


def _encoding(start: bytes) -> str:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in start[:2]:
        return "utf-16-be" if start[:1] == b"\0" else "utf-16-le"
    return "utf-8"


def _pieces(uri: str, block_bytes: int) -> Iterator[bytes]:
    """Yield the content; the first piece holds at least what `_PROBE` asks for."""
    fs, path = open_filesystem(uri)
    try:
        with fs.open(path, "rb") as raw:
            source: Any = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
            size = max(block_bytes, _PROBE)
            while piece := source.read(size):
                yield piece
                size = block_bytes
    except _BROKEN as error:
        raise Damaged(str(error)) from None


def _whole_lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Cut after the last line end of each piece; the end of the file ends its last line.

    Where the file is damaged, a line that has begun is not yielded, as its rest is missing.
    """
    carried: list[bytes] = []
    for piece in pieces:
        stop = piece.rfind(b"\n") + 1
        if stop:
            yield b"".join([*carried, piece[:stop]])
            carried = []
        carried.append(piece[stop:])
    if rest := b"".join(carried):
        yield rest


def _block(content: bytes, first: int) -> Block:
    content = content.removesuffix(b"\n")
    bad: list[tuple[int, str]] = []
    try:
        text = pl.lit(content.decode())
        lines = pl.select(text.str.split("\n").explode()).to_series()
    except UnicodeDecodeError:
        decoded: list[str | None] = []
        for number, line in enumerate(content.split(b"\n")):
            try:
                decoded.append(line.decode())
            except UnicodeDecodeError:
                decoded.append(None)
                bad.append((first + number, line.decode(errors="backslashreplace").rstrip("\r")))
        lines = pl.Series(decoded, dtype=pl.String)
    schema = {"row": pl.Int64, "line": pl.String}
    return Block(
        first, lines.str.strip_chars_end("\r").alias("line"),
        pl.DataFrame(bad, schema, orient="row"),
    )  # fmt: skip
