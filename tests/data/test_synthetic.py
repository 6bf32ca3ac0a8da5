"""The toy shop: what it plants is there, and it is the same shop everywhere."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from karma_ray.artifacts import read_manifest, read_table
from karma_ray.data.importers.toy_shop import import_toy_shop
from karma_ray.data.schema import EVENTS, ITEMS, QUERY_MATCHES, check_columns
from karma_ray.data.synthetic import ToyShop, ToyShopConfig, make_toy_shop, write_toy_shop
from karma_ray.data.synthetic.pictures import draw_items
from karma_ray.data.synthetic.words import (
    ATTRIBUTES,
    CATEGORIES,
    DEPARTMENTS,
    PROMOTION_CODE,
    value_names,
)
from karma_ray.errors import InputError

SMALL = ToyShopConfig(num_items=240, num_users=200)
SMALL_HASH = "550007640afa8e97"
DEFAULT_HASH = "e3279c522d234d1d"


@pytest.fixture(scope="module")
def shop() -> ToyShop:
    return make_toy_shop(SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("shop"))
    write_toy_shop(uri, SMALL)
    return uri


def test_the_small_shop_is_the_same_on_every_machine(folder: str) -> None:
    assert read_manifest(folder, "data")["data_hash"] == SMALL_HASH


def test_the_default_shop_is_the_same_on_every_machine(tmp_path: Path) -> None:
    assert write_toy_shop(str(tmp_path))["data_hash"] == DEFAULT_HASH


def test_another_seed_is_another_shop(folder: str, tmp_path: Path) -> None:
    other = write_toy_shop(str(tmp_path), ToyShopConfig(seed=1, num_items=240, num_users=200))
    assert other["data_hash"] != read_manifest(folder)["data_hash"]


def test_a_file_describes_another_shop(folder: str, tmp_path: Path) -> None:
    few = tmp_path / "few_users.json"
    few.write_text('{"num_items": 240, "num_users": 200}')
    manifest = import_toy_shop(str(few), str(tmp_path / "shop"))
    assert manifest["name"] == "toy_shop-few_users"
    assert manifest["data_hash"] == SMALL_HASH
    assert manifest["counts"] == read_manifest(folder)["counts"]
    other = import_toy_shop(str(few), str(tmp_path / "shop"), seed=1)
    assert other["data_hash"] != SMALL_HASH


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a JSON file"),
        ("[1]", "not a JSON object"),
        ('{"num_user": 5}', r"num_user in .*not a known field; choices: .*num_users"),
        ('{"num_users": "many"}', r"num_users in .*'many' should be a valid integer"),
        ('{"num_users": 0}', "num_users: 0 is not between 1"),
        ('{"promo_factor": -1}', "promo_factor"),
        ('{"click_shares": [1, 1, 1, 1]}', "do not add up to 1"),
        ('{"sessions": [9, 3]}', "has a smallest number above"),
    ],
)
def test_an_impossible_shop_is_refused_by_field(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "shop.json").write_text(text)
    with pytest.raises(InputError, match=message):
        import_toy_shop(str(tmp_path / "shop.json"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_tables_have_the_contracts_columns(folder: str) -> None:
    for name, schema in (("items", ITEMS), ("events", EVENTS), ("query_matches", QUERY_MATCHES)):
        table = read_table(f"{folder}/{name}")
        assert check_columns(table, schema, name).schema.names == table.column_names
    facts = read_manifest(folder, "data")
    assert (facts["query_source"], facts["negative_source"]) == ("real", "exposed")
    assert facts["valid_start"] == "2025-03-03T00:00:00+00:00"
    assert facts["test_start"] == "2025-03-10T00:00:00+00:00"


def test_every_shown_item_matches_its_query_and_pages_hold_no_item_twice(folder: str) -> None:
    matches = read_table(f"{folder}/query_matches").to_pydict()
    of_query = dict(zip(matches["query"], map(set, matches["item_ids"]), strict=True))
    for event in read_table(f"{folder}/events").to_pylist():
        shown = event["exposed_item_ids"]
        assert set(shown) <= of_query[event["query"]]
        assert len(set(shown)) == len(shown)
        assert set(event["clicked_item_ids"]) < set(shown)  # and a non-click stays


def test_query_matches_agree_with_the_attributes_a_query_names(folder: str) -> None:
    items = read_table(f"{folder}/items").to_pylist()
    matches = dict(zip(*read_table(f"{folder}/query_matches").to_pydict().values(), strict=True))
    for row in read_table(f"{folder}/truth/queries").to_pylist()[::7]:
        named = {key: value for key, value in row.items() if key != "query" and value}
        expected = [i["item_id"] for i in items if all(i[k] == v for k, v in named.items())]
        assert matches[row["query"]] == expected


def test_the_promotion_code_drives_clicks_until_validation_and_nothing_afterwards(
    shop: ToyShop,
) -> None:
    promoted = shop.items.promoted[shop.pages.shown] & (shop.pages.shown >= 0)
    plain = ~promoted & (shop.pages.shown >= 0)
    training = shop.visits.day < SMALL.valid_day
    rates = [
        shop.pages.clicked[days][kind[days]].mean()
        for days in (training, ~training)
        for kind in (promoted, plain)
    ]
    assert rates[0] > 1.5 * rates[1]
    assert rates[2] < 1.25 * rates[3]
    has_code = [PROMOTION_CODE in title for title in shop.items.titles]
    assert has_code == shop.items.promoted.tolist()


def test_cold_items_are_never_shown_before_their_launch(shop: ToyShop) -> None:
    launch = np.where(shop.pages.shown >= 0, shop.items.launch_day[shop.pages.shown], 0)
    assert (launch <= shop.visits.day[:, None]).all()
    cold = shop.items.launch_day > 0
    assert 0.08 < cold.mean() < 0.22
    shown_late = np.unique(shop.pages.shown[shop.visits.day >= SMALL.test_day])
    assert cold[shown_late[shown_late >= 0]].any()


def test_page_times_are_distinct_and_everybody_has_a_training_click(shop: ToyShop) -> None:
    assert len(np.unique(shop.visits.timestamp)) == len(shop.visits.timestamp)
    early = (shop.visits.day < SMALL.valid_day) & shop.pages.clicked.any(axis=1)
    assert len(np.unique(shop.visits.user[early])) == SMALL.num_users


def test_earlier_positions_are_clicked_more(shop: ToyShop) -> None:
    rates = shop.pages.clicked.sum(axis=0) / (shop.pages.shown >= 0).sum(axis=0)
    assert rates[:3].mean() > 1.2 * rates[-3:].mean()


def test_some_clicks_are_repeats(shop: ToyShop) -> None:
    page, slot = np.nonzero(shop.pages.clicked)
    pairs = np.stack([shop.visits.user[page], shop.pages.shown[page, slot]])
    repeats = 1.0 - np.unique(pairs, axis=1).shape[1] / pairs.shape[1]
    assert 0.03 < repeats < 0.4


def test_no_word_names_two_values() -> None:
    groups = [*DEPARTMENTS.values(), *CATEGORIES.values()]
    groups += [words for values in ATTRIBUTES.values() for words in values.values()]
    words = [word for group in groups for word in group]
    assert len(words) == len(set(words))


def test_titles_say_what_items_are(shop: ToyShop) -> None:
    names = value_names()
    for item in range(0, SMALL.num_items, 5):
        title = set(shop.items.titles[item].split())
        assert title & set(CATEGORIES[list(CATEGORIES)[shop.items.category[item]]])
        for column, name in enumerate(("colour", "material", "style")):
            value = names[name][shop.items.values[item, column]]
            assert title & set(ATTRIBUTES[name][value])


def test_pictures_show_the_colour_and_survive_encoding(folder: str, shop: ToyShop) -> None:
    pixels = draw_items(shop.items, SMALL.image_size)
    images = read_table(f"{folder}/items", columns=["image"]).column("image").to_pylist()
    for item in (0, 17, 101):
        decoded = np.asarray(Image.open(io.BytesIO(images[item])))
        np.testing.assert_array_equal(decoded, pixels[item])
    # Two items of the same attributes but the colour look different.
    assert len(np.unique(pixels.reshape(len(pixels), -1), axis=0)) > 0.95 * len(pixels)


def test_a_wrong_configuration_names_its_field() -> None:
    with pytest.raises(InputError, match="num_items"):
        ToyShopConfig(num_items=10)
    with pytest.raises(InputError, match="valid_day"):
        ToyShopConfig(valid_day=65)
