from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from karma_ray.errors import InputError
from karma_ray.report.page import render_report

VOID = {"meta", "img", "br"}


class BalancedHtml(HTMLParser):
    """Collects the words; fails on a tag closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(page: str) -> tuple[str, str]:
    text = Path(page).read_text(encoding="utf-8")
    parser = BalancedHtml()
    parser.feed(text)
    assert parser.open == []
    return text, " ".join(" ".join(parser.words).split())


def test_the_page_shows_metrics_curves_checks_cases_and_decoded_text(write_run) -> None:
    run = write_run()
    text, words = read(render_report(run))
    for expected in (
        "In plain words", "Inside the query's own items", "Cold items", "Repeat targets",
        "Checks of the model", "Red mug with stripes", "red mug with dots ceramic",
        "Blue mug with stars", "karma_text on toy_shop", "1,234",
    ):  # fmt: skip
        assert expected in words
    assert text.count("data:image/png;base64,") == 6


def test_the_page_opens_with_words_bars_and_cases_and_folds_the_tables(write_run) -> None:
    text, _ = read(render_report(write_run()))
    parts = ["In plain words", "Between floors and ceilings", "red mug", "All metrics", "Curves"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    tables = text[text.index("All metrics") : text.index("<h2>Curves")]
    assert tables.count("<table>") == tables.count("<details>") == 6


def test_cases_after_the_first_four_fold_away(write_run) -> None:
    case = {"query": "mug", "history": [], "truth": "Mug", "rank": 1, "recalled": [], "decoded": ""}
    _, words = read(render_report(write_run(**{"report/cases.json": [case] * 6})))
    assert "2 more cases" in words
    _, words = read(render_report(write_run(**{"report/cases.json": [case] * 4})))
    assert "more cases" not in words


def test_the_page_stands_alone(write_run) -> None:
    text, _ = read(render_report(write_run()))
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    assert "http://" not in text and "https://" not in text


def test_every_picture_is_also_a_png_file(write_run) -> None:
    run = write_run()
    render_report(run)
    pictures = sorted(Path(run, "report").glob("*.png"))
    assert [picture.stem for picture in pictures] == [
        "collapse", "comparison", "decode_gap", "losses", "negatives", "validation",
    ]  # fmt: skip
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_titles_and_queries_cannot_inject_markup(write_run) -> None:
    attack = "<script>alert('x')</script>"
    case = {
        "query": attack,
        "history": [{"query": attack, "title": attack}],
        "truth": attack,
        "rank": 1,
        "recalled": [{"title": attack, "score": 1.0, "is_truth": True}],
        "decoded": attack,
    }
    run = write_run(
        **{
            "report/cases.json": [case],
            "config.json": {"recipe": attack},
            "data.json": {"name": attack, "notes": [attack]},
        }
    )
    text, words = read(render_report(run))
    assert "<script" not in text
    assert attack in words


def test_derived_queries_and_proxy_negatives_are_labelled(write_run) -> None:
    run = write_run(
        **{"data.json": {"name": "hm", "query_source": "derived", "negative_source": "proxy"}}
    )
    _, words = read(render_report(run))
    assert "DERIVED queries" in words and "PROXY negatives" in words
    card = Path(run, "report", "model_card.md").read_text()
    assert "DERIVED queries" in card and "PROXY negatives" in card


def test_a_floor_run_needs_no_curves_checks_or_cases(write_run) -> None:
    absent = dict.fromkeys(("floors.json", "metrics.jsonl", "checks.json", "report/cases.json"))
    run = write_run(**absent, **{"config.json": {"recipe": "popularity", "seed": 0}})
    _, words = read(render_report(run))
    assert "popularity on toy_shop" in words
    assert "Cases" not in words
    assert [picture.stem for picture in Path(run, "report").glob("*.png")] == ["comparison"]
    assert "A baseline without training" in Path(run, "report", "model_card.md").read_text()


def test_a_run_with_only_a_config_still_has_a_page(write_run) -> None:
    names = ("metrics.json", "floors.json", "metrics.jsonl", "checks.json", "data.json")
    run = write_run(**dict.fromkeys((*names, "report/cases.json")))
    _, words = read(render_report(run))
    assert "This run has no metrics yet." in words


def test_rendering_twice_gives_the_same_page(write_run) -> None:
    run = write_run()
    assert Path(render_report(run)).read_bytes() == Path(render_report(run)).read_bytes()


def test_page_and_card_say_how_much_of_the_model_learns(write_run) -> None:
    sizes = {"num_parameters": 1234567, "num_trained": 45678, "item_layers": 30,
             "item_layers_frozen": 26, "user_layers": 12}  # fmt: skip
    model = {"user_decoder": {"layers": 12}}
    run = write_run(
        **{"bundle/manifest.json": sizes, "config.json": {"recipe": "karma_text", "model": model}}
    )
    sentence = (
        "45,678 of the 1,234,567 weights learn, of the item encoder the top 4 of 30 layers; "
        "the user decoder is the first 12 layers of its checkpoint."
    )
    assert sentence in read(render_report(run))[1]
    assert sentence in Path(run, "report", "model_card.md").read_text()
    plain = {"num_parameters": 10, "num_trained": 10, "item_layers": 2, "item_layers_frozen": 0}
    words = read(render_report(write_run(**{"bundle/manifest.json": plain})))[1]
    assert "All 10 weights learn." in words


def test_the_model_card_tabulates_every_ranker(write_run) -> None:
    run = write_run()
    render_report(run)
    table = [
        line
        for line in Path(run, "report", "model_card.md").read_text().splitlines()
        if line.startswith("|")
    ]
    assert {line.count("|") for line in table} == {8}
    assert "| karma_text |" in table[0]


def test_no_run_no_report(tmp_path) -> None:
    with pytest.raises(InputError, match="is not a run folder"):
        render_report(str(tmp_path))
