"""What pages are made of: templates, rows of facts about the data, and files."""

from __future__ import annotations

from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined

from karma_ray.artifacts import open_filesystem
from karma_ray.report.record import RunRecord, number

_DATA_FACTS = {
    "name": "name",
    "query_source": "queries",
    "negative_source": "negatives",
    "counts": "counts",
    "item_texts": "item texts, tokens",
    "quarantined": "quarantined rows",
    "valid_start": "validation starts",
    "test_start": "test starts",
    "notes": "notes",
}


def environment(escape: bool) -> Environment:
    """Return the template environment; `escape` for HTML."""
    templates = Environment(
        loader=PackageLoader("karma_ray.report", "templates"),
        autoescape=escape,
        undefined=StrictUndefined,
    )
    templates.filters["score"] = _score
    return templates


def data_rows(record: RunRecord) -> list[tuple[str, str]]:
    return [
        (title, _plain(record.data[key]))
        for key, title in _DATA_FACTS.items()
        if record.data.get(key) not in (None, [], {}, "")
    ]


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return "; ".join(_plain(part) for part in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _score(value: object) -> str:
    score = number(value)
    return "" if score is None else f"{score:.2f}"


def write_bytes(uri: str, content: bytes) -> None:
    """Write a file, creating its folders."""
    fs, path = open_filesystem(uri)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    with fs.open(path, "wb") as sink:
        sink.write(content)
