"""What the search page asks beside recall, and what it may not do."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from jobs.serve import main
from karma_ray.errors import InputError
from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving import schemas
from karma_ray.serving.app import build_app
from karma_ray.serving.engine import Engine
from karma_ray.serving.page.routes import MAX_WAITING, SearchPage, shows_users
from karma_ray.serving.process import free_port
from karma_ray.serving.service import Service
from tests import shop_window, tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return shop_window.write(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def retriever(run: str) -> Retriever:
    return Retriever.load(run)


@contextmanager
def opened(
    retriever: Retriever, page: SearchPage | None, token: str | None = None
) -> Iterator[TestClient]:
    with TestClient(build_app(Service(retriever), token, page)) as client:
        yield client


@pytest.fixture(scope="module")
def client(retriever: Retriever, run: str) -> Iterator[TestClient]:
    page = SearchPage(run, show_users=True, other=Service.load(run))
    with opened(retriever, page) as found:
        yield found


def test_the_page_is_one_file_that_may_load_nothing_else(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert len(re.findall(r"'sha256-[^']+'", policy)) == 2
    assert not re.search(r"https?://|src=\"|@import|url\(", answer.text)
    assert '<html lang="en">' in answer.text


def test_the_page_sets_what_it_is_given_as_text_alone(client: TestClient) -> None:
    script = client.get("/").text.split("<script>", 1)[1]
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in script


def test_the_calls_are_described_on_a_page_that_loads_nothing(client: TestClient) -> None:
    answer, document = client.get("/docs"), client.get("/openapi.json").json()
    assert "default-src 'none'; script-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"https?:|//\w|src=|@import|url\(|<script", answer.text)
    places = set(re.findall(r'id="([^"]+)"', answer.text))
    assert places == {*document["paths"], *(f"type-{n}" for n in document["components"]["schemas"])}
    links = {link for link in re.findall(r'href="([^"]+)"', answer.text) if link != "data:,"}
    assert links == {"openapi.json", *(f"#{place}" for place in places)}
    for name in schemas.RankRequest.model_fields:
        assert f"<td>{name}" in answer.text
    assert "Only items of this category." in answer.text and "By default 10." in answer.text
    assert client.get("/redoc").status_code == 404


def test_the_page_says_what_it_can_show(client: TestClient) -> None:
    found = client.get("/page/about").json()
    assert found["num_items"] == 40 and found["run"] == {"title": "run", "folder": ""}
    assert found["users"] and found["no_users"] is None and found["no_floors"] is None
    assert found["pictures"] and found["other"] == found["run"] and not found["speaks"]


def test_people_are_those_with_a_history_at_their_last_click(client: TestClient) -> None:
    assert client.get("/page/users").json()["users"] == [
        {"user_id": "u1", "query": "red mug", "num_clicks": 3},
        {"user_id": "u2", "query": "lamp", "num_clicks": 2},
    ]
    found = client.post("/page/user", json={"user_id": "u1"}).json()
    assert found["query"] == "red mug" and found["next"]["item_id"] == "i7"
    assert [(c["item_id"], c["title"] is None) for c in found["history"]] == [
        ("i1", False), ("i2", False), ("gone", True),
    ]  # fmt: skip
    entry = {k: v for k, v in found["history"][0].items() if k != "title"}
    assert client.post("/v1/recall", json={"history": [entry]}).status_code == 200
    assert client.post("/page/user", json={"user_id": "x"}).json() == {"found": False}


def test_floors_rank_as_they_are_measured(client: TestClient) -> None:
    body = {"query": "red mug", "history": [{"item_id": "i7"}], "k": 3}
    found = client.post("/page/floors", json=body).json()
    assert [(i["item_id"], i["score"]) for i in found["popularity"]] == [
        ("i7", 3.0), ("i8", 2.0), ("i9", 1.0),
    ]  # fmt: skip
    assert "mug" in found["tfidf"][0]["title"] and found["tfidf"][0]["score"] > 0
    left = client.post("/page/floors", json={**body, "exclude_history": True}).json()
    assert [i["item_id"] for i in left["popularity"]] == ["i8", "i9"]
    assert client.post("/page/floors", json={}).json()["tfidf"] == []


def test_pictures_are_small_jpegs_of_the_items_that_have_one(client: TestClient) -> None:
    ids = ["i39", "i30", "i31", "nobody", "i0", "i39"]
    for _ in range(2):  # read, and remembered
        found = client.post("/page/pictures", json={"item_ids": ids}).json()["pictures"]
        assert set(found) == {"i39", "i0"}
    data = base64.b64decode(found["i0"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(data)).size == (96, 96)


def test_the_other_run_answers_beside(client: TestClient) -> None:
    body = {"query": "red mug", "k": 4}
    ours = client.post("/v1/recall", json=body).json()
    assert client.post("/page/other", json=body).json() == ours


@pytest.mark.parametrize("path", ["user", "pictures", "floors", "thought", "other"])
def test_what_is_no_question_is_422_and_names_the_field(client: TestClient, path: str) -> None:
    answer = client.post(f"/page/{path}", json={"nonsense": 1})
    assert answer.status_code == 422
    assert ["body", "nonsense"] in [error["loc"] for error in answer.json()["detail"]]
    assert client.post(f"/page/{path}", content=b'{"query": "\\ud800"}').status_code == 422


def test_a_token_guards_everything_but_the_empty_page(retriever: Retriever, run: str) -> None:
    with opened(retriever, SearchPage(run, show_users=True), "secret") as client:
        assert client.get("/").status_code == 200
        for path in ("/page/about", "/page/users"):
            assert client.get(path).status_code == 401
        header = {"authorization": "Bearer secret"}
        assert client.get("/page/about", headers=header).json()["users"]


def test_people_are_shown_to_this_machine_or_to_callers_with_a_token(retriever, run) -> None:
    assert shows_users("127.0.0.1", None) and shows_users("0.0.0.0", "secret")
    assert not shows_users("0.0.0.0", None)
    with opened(retriever, SearchPage(run, show_users=False)) as client:
        about = client.get("/page/about").json()
        assert not about["users"] and "bearer token" in about["no_users"]
        assert client.get("/page/users").json() == {"users": []}
        assert client.post("/page/user", json={"user_id": "u1"}).json() == {"found": False}


def test_a_second_run_that_cannot_be_shown_is_said_before_anything_starts(run: str) -> None:
    for host in ([], ["--without-ray"]):
        with pytest.raises(InputError, match=r"nowhere.* does not exist"):
            main([run, "--compare", f"{run}/nowhere", "--port", str(free_port()), *host])


def test_after_a_publication_the_page_is_that_of_the_run_that_answers(run, tmp_path) -> None:
    tiny_run.write_run(tmp_path, seed=5)
    (tmp_path / "run").rename(tmp_path / "newer")
    other = str(tmp_path / "newer")
    service, page = Service.load(run), SearchPage(show_users=True)
    with TestClient(build_app(service, None, page)) as client:
        before = client.get("/page/about").json()
        assert before["run"]["title"] == "run" and before["users"]
        service.swap(Engine(Retriever.load(other), 0, run=other))
        after, answer = client.get("/page/about").json(), client.post("/v1/recall", json={}).json()
        assert after["run"] == {"title": "newer", "folder": ""} and not after["users"]
        for name in ("model_version", "index_version"):
            assert after[name] == answer[name] != before[name]
        assert client.get("/page/users").json() == {"users": []}
        assert client.post("/page/user", json={"user_id": "u1"}).json() == {"found": False}


def test_without_its_data_the_page_says_so_and_still_searches(retriever, run, tmp_path) -> None:
    shutil.copytree(run, tmp_path / "run")
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("/data", "/gone"))
    for page in (None, SearchPage(str(tmp_path / "run"), show_users=True)):
        with opened(retriever, page) as client:
            about = client.get("/page/about").json()
            assert not about["users"] and "cannot be read" in about["no_users"]
            assert "cannot be read" in about["no_floors"] and not about["pictures"]
            assert str(tmp_path) not in str(about)
            assert client.post("/page/floors", json={}).json() == {}
            assert client.post("/page/thought", json={}).json() == {"text": None}
            assert client.post("/page/pictures", json={"item_ids": ["i0"]}).json()["pictures"] == {}
            assert client.post("/page/other", json={}).status_code == 500
            assert len(client.post("/v1/recall", json={}).json()["items"]) == 10


def test_a_broken_data_folder_breaks_no_recall_and_tells_no_path(retriever, run, tmp_path) -> None:
    shutil.copytree(Path(run).parent, tmp_path / "all")
    copy = tmp_path / "all" / "run"
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(Path(run).parent), str(tmp_path / "all")))
    for file in (tmp_path / "all" / "data" / "sequences").glob("*.parquet"):
        file.write_bytes(b"broken")
    with opened(retriever, SearchPage(str(copy), show_users=True)) as client:
        answer = client.post("/page/floors", json={"query": "mug"})
        assert answer.status_code == 500
        assert answer.json() == {"detail": "this part of the page cannot be computed"}
        assert client.post("/v1/recall", json={}).status_code == 200


def test_a_slow_page_delays_no_recall_and_refuses_what_it_cannot_hold(retriever, run) -> None:
    page, free = SearchPage(run), threading.Event()
    app = build_app(Service(retriever), None, page)

    async def ask() -> tuple[int, int]:
        slow = [asyncio.create_task(page.compute(free.wait)) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://page"
        ) as client:
            recalled = await client.post("/v1/recall", json={})
            refused = await client.post("/page/floors", json={})
        free.set()
        await asyncio.gather(*slow)
        assert refused.headers["retry-after"] == "1"
        return recalled.status_code, refused.status_code

    assert asyncio.run(ask()) == (200, 503)
