"""Write the pictures of the search page in docs/, of an endpoint that is up and lends a person.

python jobs/serve.py RUN --without-ray &
python -m tests.page_pictures http://127.0.0.1:8000 user00029 docs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.browser import Browser, Tab, find

SIZES = {"search-page": (1280, 1010), "search-page-phone": (360, 1060)}
"""Width and height of each picture."""
NUM_SEARCHES = 8
"""Searches before the picture, so that the time that it shows is not that of the first one."""


def show(tab: Tab, url: str, user: str) -> None:
    """Choose a person, let the model say what it thinks, and scroll back up."""
    tab.go(url)
    tab.wait("document.querySelectorAll('#user option').length > 1")
    tab.ask(
        f"(() => {{ const u = document.getElementById('user'); u.value = {json.dumps(user)};"
        "u.dispatchEvent(new Event('change')); })()"
    )
    ready = "!document.querySelector('.waiting')"
    tab.wait(f"document.querySelector('#history li') && {ready}")
    for _ in range(NUM_SEARCHES):
        tab.ask("document.getElementById('exclude').dispatchEvent(new Event('change'))")
        tab.wait(ready)
    if tab.ask("document.getElementById('speak-field').offsetParent !== null"):
        tab.click("#speak")
        tab.wait("document.getElementById('said-words').textContent.length > 2")
    tab.wait("document.getElementById('rank-tfidf').textContent")
    shown = "box.firstElementChild?.complete || pictures.get(box.dataset.item) === ''"
    tab.wait(f"[...document.querySelectorAll('.item .thumb')].every(box => {shown})")
    tab.ask("scrollTo(0, 0)")


def main() -> None:
    url, user, folder = sys.argv[1:4]
    program = find()
    if program is None:
        sys.exit("no Chromium is installed")
    with Browser(program) as browser:
        for name, (width, height) in SIZES.items():
            tab = browser.tab(width, height, phone=width < 500)
            show(tab, url, user)
            path = Path(folder) / f"{name}.png"
            tab.picture(path)
            print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
