"""Other words for queries: a table of phrases and their paraphrases.

A ranker that has learnt which items are clicked after a word does not thereby know what another
word means. `paraphrase_tables/` has tables for the queries that importers derive.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa

from karma_ray.artifacts import exists, open_filesystem, value_hash
from karma_ray.errors import InputError

FIELD = "evaluation.paraphrases"
_TABLES = Path(__file__).parent / "paraphrase_tables"
_COLUMNS = ("phrase", "paraphrase")
_SEPARATORS = {".tsv": "\t", ".csv": ","}


@dataclass(frozen=True)
class Paraphrases:
    """A table of paraphrases by phrase; letter case and repeated blanks do not matter."""

    name: str
    table: Mapping[str, str]

    @classmethod
    def load(cls, name: str) -> Paraphrases:
        """Read a table of `paraphrase_tables/`, or a file (path or URI).

        Raises InputError on an unknown name or file, missing columns, an empty cell, and a phrase
        with two paraphrases.
        """
        known = sorted(path.stem for path in _TABLES.glob("*.tsv"))
        frame = _read(str(_TABLES / f"{name}.tsv") if name in known else name, known)
        for column in _COLUMNS:
            if column not in frame.columns:
                problem = f"has no column {column}"
                raise InputError(FIELD, name, problem, choices=frame.columns)
        table: dict[str, str] = {}
        for phrase, paraphrase in frame.select(_COLUMNS).cast(pl.String).iter_rows():
            if not (key := _plain(phrase)) or not (value := " ".join((paraphrase or "").split())):
                raise InputError(FIELD, name, "has a row with an empty cell")
            if table.setdefault(key, value) != value:
                raise InputError(FIELD, name, f"has two paraphrases of {key!r}")
        return cls(name, table)

    @property
    def content_hash(self) -> str:
        """A hash of the table's content."""
        return value_hash(dict(self.table))

    def rewrite(self, query: str | None) -> str | None:
        """Return `query` with the paraphrase of each of its phrases.

        From the left, the longest phrase is taken. None if the phrases do not cover the query.
        """
        words, found, start = _plain(query).split(), [], 0
        while start < len(words):
            ends = range(len(words), start, -1)
            end = next((n for n in ends if " ".join(words[start:n]) in self.table), None)
            if end is None:
                return None
            found.append(self.table[" ".join(words[start:end])])
            start = end
        return " ".join(found) or None

    def rewritten(self, examples: pa.Table) -> pa.Table:
        """Return EXAMPLES whose queries are rewritten; other queries keep their text."""
        queries = examples.column("query").to_pylist()
        other = {query: self.rewrite(query) or query for query in dict.fromkeys(queries)}
        place = examples.column_names.index("query")
        column = pa.array([other[query] for query in queries], pa.string())
        return examples.set_column(place, examples.field(place), column)

    def num_rewritten(self, examples: pa.Table) -> int:
        """Return the number of examples whose query is rewritten."""
        queries = examples.column("query").to_pylist()
        found = {query for query in dict.fromkeys(queries) if self.rewrite(query) is not None}
        return sum(query in found for query in queries)

    def check(self, examples: pa.Table) -> None:
        """Raise InputError if there are examples, but no query of theirs is rewritten."""
        if examples.num_rows and not self.num_rewritten(examples):
            queries = [query for query in examples.column("query").to_pylist() if query]
            asked = f"such as {queries[0]!r}" if queries else "of which there are none"
            raise InputError(FIELD, self.name, f"covers no query of the test, {asked}")


def _plain(text: str | None) -> str:
    return " ".join((text or "").lower().split())


def _read(uri: str, known: list[str]) -> pl.DataFrame:
    ending = Path(uri).suffix.lower()
    if ending not in (".parquet", *_SEPARATORS) or not exists(uri):
        problem = "is neither a known table nor a .tsv, .csv or .parquet file"
        raise InputError(FIELD, uri, problem, choices=known)
    fs, path = open_filesystem(uri)
    content = io.BytesIO(fs.cat_file(path))
    try:
        if ending == ".parquet":
            return pl.read_parquet(content)
        quote = '"' if ending == ".csv" else None
        return pl.read_csv(
            content, separator=_SEPARATORS[ending], quote_char=quote, infer_schema=False
        )
    except pl.exceptions.PolarsError as error:
        raise InputError(FIELD, uri, f"cannot be read ({error})") from None
