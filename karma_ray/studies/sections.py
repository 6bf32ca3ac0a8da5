"""The elements of a report: sections with notes, table and picture, number formats, the page."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from karma_ray.studies.comparison import Difference


@dataclass(frozen=True)
class Section:
    """A heading, notes, a table and a picture; each may be absent."""

    title: str
    level: int = 3
    notes: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    picture: str = ""
    folded: bool = False


def signed(value: float) -> str:
    return f"{value:+.2f}"


def spread_of(values: Iterable[float], digits: int = 2) -> str:
    found = list(values)
    if not found:
        return "–"
    mean = f"{statistics.fmean(found):.{digits}f}"
    return mean if len(found) == 1 else f"{mean} ± {statistics.stdev(found):.{digits}f}"


def delta(found: Difference | None) -> str:
    """Format a difference with its spread over seeds and its mark."""
    if found is None:
        return "–"
    spread = "" if found.spread is None else f" ± {found.spread:.2f}"
    return f"{signed(found.mean)}{spread} {found.mark}".rstrip()


def mean_of(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def plain(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def html_page(
    title: str, sections: Sequence[Section], pictures: Mapping[str, bytes], command: str
) -> str:
    """Return a self-contained page; `pictures` are PNGs by the names that sections give."""
    environment = Environment(
        loader=PackageLoader("karma_ray.studies", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    encoded = {name: base64.b64encode(content).decode() for name, content in pictures.items()}
    template = environment.get_template("study.html.jinja")
    return template.render(title=title, sections=sections, pictures=encoded, command=command)
