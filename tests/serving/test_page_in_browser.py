"""The search page in a real, headless Chromium, at the width of a desk and of a phone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image

from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving.app import build_app
from karma_ray.serving.engine import Engine
from karma_ray.serving.page.routes import SearchPage
from karma_ray.serving.service import Service
from tests import shop_window, tiny_run
from tests.browser import Browser, Tab, find
from tests.page_pictures import SIZES, show

pytestmark = pytest.mark.slow

TITLES = "[...document.querySelectorAll('#list-ours .words')].map(e => e.innerText).join('|')"
FOCUSED = "document.activeElement.closest('ol')?.id + ':' + document.activeElement.innerText"
NAMELESS = """[...document.querySelectorAll('button, input, select')]
    .filter(e => e.offsetParent && !(e.innerText || e.labels?.length || e.ariaLabel))
    .map(e => e.outerHTML)"""
"""Controls that a screen reader could not name."""
FAINT = """(() => {
    const numbers = c => c.match(/[\\d.]+/g).map(Number);
    const light = c => numbers(c).slice(0, 3).map(v => v / 255)
        .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, n) => sum + v * [.2126, .7152, .0722][n], 0);
    const ground = e => { const c = getComputedStyle(e).backgroundColor;
        return (numbers(c)[3] ?? 1) > 0 || !e.parentElement ? c : ground(e.parentElement); };
    return [...document.querySelectorAll('body *')]
        .filter(e => e.offsetParent)
        .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
        .filter(e => { const a = light(getComputedStyle(e).color), b = light(ground(e));
            return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5; })
        .map(e => e.outerHTML);
})()"""
"""Texts whose contrast with what is behind them is under 4.5 to 1."""
READY = "document.querySelector('#list-ours .item') && !document.querySelector('.waiting')"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return shop_window.write(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find()
    if program is None:
        pytest.skip("no Chromium is installed, and the system's package could not be")
    with Browser(program) as found:
        yield found


@contextmanager
def served(run: str, token: str | None = None) -> Iterator[tuple[str, Service]]:
    service = Service.load(run)
    page = SearchPage(show_users=True, other=Service.load(run))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # a client that is faster than the server waits
        app = build_app(service, token, page)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(run: str) -> Iterator[str]:
    with served(run) as (found, _):
        yield found


def opened(browser: Browser, url: str, width: int, dark: bool = False) -> Tab:
    tab = browser.tab(width, 780, phone=width < 500, dark=dark)
    tab.go(url)
    tab.wait(READY)
    return tab


def changed(tab: Tab, before: str) -> str:
    tab.wait(f"{READY} && {TITLES} !== {before!r}")
    found: str = tab.ask(TITLES)
    return found


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, False), (360, True)])
def test_a_person_searches_and_clicks(browser: Browser, url: str, width: int, dark: bool) -> None:
    tab = opened(browser, url, width, dark)
    assert tab.ask("document.activeElement.id") == "query"
    before = tab.ask(TITLES)
    tab.type("red mug")
    found = changed(tab, before)
    tab.click("#list-ours .item")
    tab.wait("document.querySelectorAll('#history li').length === 1")
    clicked = found.split("|")[0]
    after = changed(tab, found)
    assert clicked not in after.split("|")  # clicked items are left out
    assert "for “red mug”" in tab.ask("document.getElementById('history').innerText")
    assert "ms" in tab.ask("document.getElementById('latency').innerText")
    tab.wait("document.querySelector('#history img')")
    # Nothing is wider than the window, whatever is shown, and nothing was complained of.
    tab.click("#other")
    tab.wait("document.querySelector('#list-other .item')")
    assert tab.ask("document.documentElement.scrollWidth <= innerWidth")
    shown = "[...document.querySelectorAll('.column')].filter(c => c.offsetParent).length"
    assert tab.ask(shown) == (1 if width < 500 else 4)
    assert tab.ask(NAMELESS) == []
    assert tab.ask(FAINT) == []
    assert tab.complaints() == []


@pytest.mark.parametrize("name", SIZES)
def test_the_pictures_of_the_docs_can_be_taken(browser, url, name: str, tmp_path: Path) -> None:
    width, height = SIZES[name]
    tab = browser.tab(width, height, phone=width < 500)
    show(tab, url, "u1")
    image = tab.picture(tmp_path / f"{name}.png")
    assert image.size == (width, height)
    with Image.open(tmp_path / f"{name}.png") as written:
        assert written.size == (width, height)
    pixels = np.asarray(image)
    # Text, lines and thumbnails: no large part of it is of one colour, and the docs' has its size.
    for part in np.array_split(pixels, 4):
        colours, counts = np.unique(part.reshape(-1, 3), axis=0, return_counts=True)
        assert len(colours) > 50 and counts.max() < 0.97 * counts.sum()
    with Image.open(Path(__file__).parents[2] / f"docs/{name}.png") as shown:
        assert shown.size == (width, height)
    assert tab.complaints() == []


def test_the_calls_are_shown_at_any_width(browser: Browser, url: str) -> None:
    for width in (1280, 360):
        tab = browser.tab(width, 780, phone=width < 500)
        tab.go(f"{url}/docs")
        assert "POST /v1/recall" in tab.ask("document.body.innerText")
        assert tab.ask("document.documentElement.scrollWidth <= innerWidth")
        assert tab.ask(FAINT) == []
        assert tab.complaints() == []


def test_keys_are_enough(browser: Browser, url: str) -> None:
    tab = opened(browser, url, 1280)
    before = tab.ask(TITLES)
    tab.type("lamp")
    tab.press("Enter")
    found = changed(tab, before)
    first, second = found.split("|")[:2]
    tab.press("ArrowDown")
    assert first in tab.ask(FOCUSED) and tab.ask(FOCUSED).startswith("list-ours")
    tab.press("ArrowDown")
    assert second in tab.ask(FOCUSED)
    tab.wait("document.querySelectorAll('#list-popularity .item').length > 1")
    tab.press("ArrowRight")
    assert tab.ask(FOCUSED).startswith("list-popularity")
    tab.press("ArrowLeft")
    tab.press("Enter")
    after = changed(tab, found)
    assert second not in after.split("|")
    assert tab.ask(FOCUSED).startswith("list-ours")  # one may go on clicking
    tab.press("Escape")
    assert tab.ask("document.activeElement.id") == "query"
    tab.press("Escape")
    assert tab.ask("document.getElementById('query').value") == ""
    assert tab.complaints() == []


def test_a_person_of_the_test_split_brings_history_query_and_next_click(browser, url) -> None:
    tab = opened(browser, url, 360)
    tab.wait("document.querySelectorAll('#user option').length === 3")
    tab.ask("document.getElementById('user').focus()")
    tab.press("ArrowDown")
    tab.ask("document.getElementById('user').dispatchEvent(new Event('change'))")
    tab.wait("document.querySelectorAll('#history li').length === 3")
    assert tab.ask("document.getElementById('query').value") == "red mug"
    tab.wait("document.getElementById('rank-popularity').textContent.includes('number 1')")
    assert "clicked next" in tab.ask("document.getElementById('target').innerText")
    tab.click("#choice label:nth-child(2)")
    tab.wait("document.querySelector('#column-popularity').offsetParent")
    tab.click("#clear")
    tab.wait("document.querySelectorAll('#history li').length === 0")
    assert tab.complaints() == []


def test_a_title_with_a_script_stays_a_title(browser: Browser, url: str) -> None:
    tab = opened(browser, url, 1280)
    evil = "document.querySelector('#list-popularity').innerText.includes('<img src=x onerror')"
    tab.wait(evil)
    tab.wait("document.querySelectorAll('#list-popularity .item').length === 3")
    tab.ask("document.querySelectorAll('#list-popularity .item')[1].click()")
    tab.wait("document.getElementById('history').innerText.includes('<img src=x onerror')")
    assert tab.ask("document.title") == "karma_ray search"
    assert tab.ask("[...document.images].every(i => i.src.startsWith('data:image/jpeg'))")
    assert tab.complaints() == []


def test_the_token_is_asked_for_and_kept_in_the_tab(browser: Browser, run: str) -> None:
    with served(run, "secret") as (url, _):
        tab = browser.tab(360, 780)
        tab.go(url)
        tab.wait("document.activeElement.id === 'token'")
        for token, wanted in (("wrong", "refused"), ("secret", None)):
            tab.type(token)
            tab.press("Enter")
            if wanted:
                words = "document.getElementById('token-words').innerText"
                tab.wait(f"{words}.includes({wanted!r}) && document.activeElement.id === 'token'")
        tab.wait(READY)
        tab.go(url)
        tab.wait(READY)
        assert tab.ask("document.getElementById('token-form').hidden")


def test_a_publication_changes_an_open_page_with_the_next_answer(browser, run, tmp_path) -> None:
    other = tiny_run.write_run(tmp_path, seed=5)
    about = "document.getElementById('about').innerText"
    with served(run) as (url, service):
        tab = opened(browser, url, 360)
        tab.wait("document.querySelectorAll('#user option').length === 3")
        engine = Engine(Retriever.load(other), 0, run=other)
        assert engine.version["model_version"][:8] not in tab.ask(about)
        service.swap(engine)
        tab.type("mug")
        tab.wait(f"{READY} && {about}.includes({engine.version['model_version'][:8]!r})")
        tab.wait("document.getElementById('user-field').hidden")
        assert tab.ask("document.getElementById('query').value") == "mug"
        assert tab.ask("document.documentElement.scrollWidth <= innerWidth")
        assert tab.complaints() == []


def test_what_goes_wrong_is_said_in_words(browser: Browser, run: str) -> None:
    with served(run) as (url, service):
        tab = opened(browser, url, 360)
        service._batcher.max_waiting = 0
        tab.type("mug")
        tab.wait("document.getElementById('error-words').innerText.includes('is busy')")
        service._batcher.max_waiting = 8
        tab.click("#again")
        tab.wait("document.getElementById('error').hidden")
    tab.type("s")
    tab.wait("document.getElementById('error-words').innerText.includes('does not answer')")
    assert tab.ask("document.documentElement.scrollWidth <= innerWidth")
