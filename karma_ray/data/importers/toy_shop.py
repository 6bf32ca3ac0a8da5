"""Importer of toy shops of other sizes or rules, described by a JSON file."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import PurePosixPath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from karma_ray.artifacts import exists, open_filesystem
from karma_ray.data.importers.output import DataFolder
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.errors import InputError


def import_toy_shop(src: str, out: str, *, seed: int = 0) -> dict[str, Any]:
    """Generate the shop that the JSON file `src` describes; returns its manifest.

    The data set is named `toy_shop-NAME` after the file. Raises InputError as `read_shop` does.
    """
    config = read_shop(src, seed)
    with DataFolder(out) as data:
        manifest = write_toy_shop(data.work, config, name=f"toy_shop-{PurePosixPath(src).stem}")
        data.publish()
    return manifest


def read_shop(src: str, seed: int = 0) -> ToyShopConfig:
    """Read the parameters of a shop from a JSON file, for example `{"num_users": 1000}`.

    Other fields keep their defaults, and `seed` is the argument unless the file has it. Raises
    InputError on an unknown field or an impossible value.
    """
    if not exists(src):
        raise InputError("SRC", src, "does not exist; name a JSON file of fields of ToyShopConfig")
    fs, path = open_filesystem(src)
    try:
        values = json.loads(fs.cat_file(path))
    except (OSError, ValueError) as error:
        raise InputError("SRC", src, f"is not a JSON file: {error}") from None
    names = [field.name for field in fields(ToyShopConfig)]
    if not isinstance(values, dict):
        raise InputError("SRC", src, "is not a JSON object of fields", choices=names)
    for name, value in values.items():
        if name not in names:
            raise InputError(f"{name} in {src}", value, "is not a known field", choices=names)
    try:
        return TypeAdapter(ToyShopConfig).validate_python({"seed": seed, **values})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].replace("Input should be", "should be")
        raise InputError(f"{where} in {src}", first["input"], message) from None
