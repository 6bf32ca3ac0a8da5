"""The complete toy shop: generating it, writing it and hashing it."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from karma_ray.artifacts import join, write_json, write_manifest, write_table
from karma_ray.data.schema import EVENTS, ITEMS, QUERY_MATCHES, TIME, check_columns
from karma_ray.data.synthetic.config import DAY, START, ToyShopConfig
from karma_ray.data.synthetic.items import Needs, ShopItems, make_items, make_needs
from karma_ray.data.synthetic.pages import Pages, make_pages
from karma_ray.data.synthetic.people import Visits, item_weights, make_tastes, make_visits
from karma_ray.data.synthetic.pictures import draw_items, encode_png
from karma_ray.data.synthetic.words import CATEGORIES, DEPARTMENTS, value_names
from karma_ray.data.table_hash import table_hash

NOTES = [
    "synthetic: the toy shop, a seeded generator whose truth lies in truth/",
    "the promotion code DEAL77 drives clicks before valid_start and means nothing afterwards",
]


@dataclass(frozen=True)
class ToyShop:
    """Everything that the generator has drawn."""

    config: ToyShopConfig
    items: ShopItems
    needs: Needs
    tastes: dict[str, np.ndarray]
    visits: Visits
    pages: Pages


def make_toy_shop(config: ToyShopConfig) -> ToyShop:
    """Generate a whole shop; a configuration gives the same shop on every machine."""
    items = make_items(config)
    needs, tastes, visits = make_needs(items), make_tastes(config), make_visits(config)
    pages = make_pages(config, items, needs, visits, item_weights(tastes, items))
    return ToyShop(config, items, needs, tastes, visits, pages)


def write_toy_shop(
    uri: str, config: ToyShopConfig | None = None, *, name: str = "toy_shop"
) -> dict[str, Any]:
    """Write items, events, query_matches, truth/ and manifest.json; returns the manifest.

    `name` is the name of the data set in records and reports. `data_hash` in the manifest is
    computed from values and pixels instead of Parquet or PNG bytes, so it is the same on every
    machine.
    """
    shop = make_toy_shop(config or ToyShopConfig())
    config = shop.config
    pixels = draw_items(shop.items, config.image_size)
    tables = shop_tables(shop)
    digest = hashlib.sha256(pixels.tobytes())
    for part, table in tables.items():
        digest.update(f"{part} {table_hash(table)}".encode())
    pictures = pa.array([encode_png(picture) for picture in pixels], pa.binary())
    items = tables["items"]
    tables["items"] = items.set_column(items.schema.get_field_index("image"), "image", pictures)
    for part, table in tables.items():
        write_table(table, join(uri, part))
    write_json(dataclasses.asdict(config), join(uri, "truth", "config.json"))
    return write_manifest(
        uri,
        "data",
        name=name,
        query_source="real",
        negative_source="exposed",
        valid_start=_iso(config.valid_day),
        test_start=_iso(config.test_day),
        counts={
            "users": config.num_users,
            "items": config.num_items,
            "with_image": config.num_items,
            "events": len(shop.visits.user),
            "clicks": int(shop.pages.clicked.sum()),
            "queries": tables["query_matches"].num_rows,
        },
        quarantined={},
        data_hash=digest.hexdigest()[:16],
        licence="none needed: synthetic",
        notes=NOTES,
        toy_shop=dataclasses.asdict(config),
    )


def shop_tables(shop: ToyShop) -> dict[str, pa.Table]:
    """Return every table of the shop by its folder, still without pictures."""
    ids = item_ids(shop.config)
    return {
        "items": _items_table(shop, ids),
        "events": _events_table(shop, ids),
        "query_matches": _query_matches_table(shop, ids),
        "truth/items": _launch_table(shop, ids),
        "truth/tastes": _tastes_table(shop),
        "truth/states": _states_table(shop),
        "truth/queries": _queries_table(shop),
    }


def item_ids(config: ToyShopConfig) -> np.ndarray:
    """Return the ids in catalogue order, [I]."""
    return np.array([f"item{number:05d}" for number in range(config.num_items)])


def _iso(day: int) -> str:
    return f"{(START + day * DAY).astype('datetime64[s]')}+00:00"


def _user_ids(shop: ToyShop) -> np.ndarray:
    names = np.array([f"user{number:05d}" for number in range(shop.config.num_users)])
    users: np.ndarray = names[shop.visits.user]
    return users


def _items_table(shop: ToyShop, ids: np.ndarray) -> pa.Table:
    items, names = shop.items, value_names()
    values = {
        name: np.array(names[name])[items.values[:, column]] for column, name in enumerate(names)
    }
    category = np.array(list(CATEGORIES))[items.category]
    department = np.array(list(DEPARTMENTS))[items.department]
    table = pa.table(
        {
            "item_id": ids,
            "title": items.titles,
            "text": items.texts,
            "brand": values["brand"],
            "category": [f"{d} > {c}" for d, c in zip(department, category, strict=True)],
            "attr_department": department,
            "attr_category": category,
            **{f"attr_{name}": column for name, column in values.items()},
        }
    )
    return check_columns(table, ITEMS, "items")


def _id_lists(ids: np.ndarray, grid: np.ndarray, keep: np.ndarray) -> pa.Array:
    """Convert ids [I], grid [P, S] of item numbers, keep bool [P, S] to list<string> [P]."""
    offsets = np.concatenate([[0], np.cumsum(keep.sum(axis=1))]).astype(np.int32)
    shown = pa.array(ids.tolist(), pa.string()).take(pa.array(grid[keep]))
    return pa.ListArray.from_arrays(pa.array(offsets), shown)


def _events_table(shop: ToyShop, ids: np.ndarray) -> pa.Table:
    pages, users = shop.pages, _user_ids(shop)
    order = np.argsort(shop.visits.timestamp, kind="stable")  # logs are in time order
    shown, clicked = pages.shown[order], pages.clicked[order]
    days = shop.visits.day[order].tolist()
    table = pa.table(
        {
            "user_id": users[order],
            "timestamp": pa.array(shop.visits.timestamp[order]).cast(TIME),
            "query": [pages.queries[page] for page in order],
            "exposed_item_ids": _id_lists(ids, shown, shown >= 0),
            "clicked_item_ids": _id_lists(ids, shown, clicked),
            "session_id": [f"{user}-{day}" for user, day in zip(users[order], days, strict=True)],
        }
    )
    return check_columns(table, EVENTS, "events")


def _wordings(shop: ToyShop) -> dict[str, int]:
    """Return every used wording and its need; a wording names only one need."""
    pairs = dict(zip(shop.pages.queries, shop.pages.need.tolist(), strict=True))
    return dict(sorted(pairs.items()))


def _query_matches_table(shop: ToyShop, ids: np.ndarray) -> pa.Table:
    wordings = _wordings(shop)
    matches = shop.needs.matches[list(wordings.values())]  # [V, I]
    grid = np.broadcast_to(np.arange(len(ids)), matches.shape)
    columns = [pa.array(list(wordings)), _id_lists(ids, grid, matches)]
    return pa.table(columns, schema=QUERY_MATCHES)


def _queries_table(shop: ToyShop) -> pa.Table:
    wordings = _wordings(shop)
    named = [shop.needs.named[need] for need in wordings.values()]
    names = ["department", "category", *value_names()]
    columns = {
        f"attr_{name}": pa.array([n.get(name) for n in named], pa.string()) for name in names
    }
    return pa.table({"query": list(wordings), **columns})


def _launch_table(shop: ToyShop, ids: np.ndarray) -> pa.Table:
    launch = pa.array(START + shop.items.launch_day * DAY).cast(TIME)
    return pa.table({"item_id": ids, "on_sale_from": launch, "promoted": shop.items.promoted})


def _tastes_table(shop: ToyShop) -> pa.Table:
    names, rows = value_names(), []
    for name, factors in shop.tastes.items():
        for (persona, department, value), factor in np.ndenumerate(factors):
            place = list(DEPARTMENTS)[department]
            rows.append((persona, place, name, names[name][value], float(factor)))
    columns = ("persona", "department", "attribute", "value", "factor")
    return pa.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))


def _states_table(shop: ToyShop) -> pa.Table:
    """Return the user's persona at every page, by user and time."""
    return pa.table(
        {
            "user_id": _user_ids(shop),
            "timestamp": pa.array(shop.visits.timestamp).cast(TIME),
            "persona": shop.visits.persona,
        }
    )
