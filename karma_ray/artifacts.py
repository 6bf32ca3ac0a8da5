"""Files and folders: fsspec paths, Parquet tables, JSON, manifests and the run folder.

Every written folder has a `manifest.json` with a schema version, facts on its origin and the
content hashes of its parents, so that a mismatch between model, embeddings and index is refused
instead of served.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from filelock import FileLock

from karma_ray.errors import InputError
from karma_ray.stores import dropped_on_failure, store_options

SCHEMA_VERSION = 1
ROW_GROUP_ROWS = 2_048
_HIDDEN = re.compile(r"/[._]")


def open_filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the fsspec filesystem of `uri` and the path inside it."""
    return fsspec.core.url_to_fs(str(uri), **store_options(str(uri)))  # type: ignore[no-any-return]


def join(uri: str, *parts: str) -> str:
    """Join path parts below a local path or URI."""
    return "/".join([str(uri).rstrip("/"), *parts])


def absolute(uri: str) -> str:
    """Return `uri` with a local path made absolute, as workers have other working directories."""
    fs, path = open_filesystem(uri)
    return path if "file" in fs.protocol else uri


def remove(uri: str) -> None:
    """Remove a file or folder if it exists."""
    fs, path = open_filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def move(source: str, target: str) -> None:
    """Move a file or folder of a filesystem to a place where nothing is; manifests come last."""
    (fs, old), (_, new) = open_filesystem(source), open_filesystem(target)
    if "file" in fs.protocol:
        fs.mv(old, new, recursive=True)
        return
    fs.invalidate_cache()  # other processes may have written below it
    found = fs.find(old)  # a store has no folders that could be moved
    manifests = [name for name in found if name.endswith("manifest.json")]
    for names in ([name for name in found if name not in manifests], manifests):
        if names:
            fs.copy(names, [f"{new}{name[len(old) :]}" for name in names])
    fs.rm(old, recursive=True)


def exists(uri: str) -> bool:
    """Whether a file or folder exists at `uri`."""
    fs, path = open_filesystem(uri)
    return bool(fs.exists(path))


def locked(path: str) -> AbstractContextManager[Any]:
    """Keep other processes of this machine from writing `path` at the same time.

    It has no effect on a URI: object stores have no locks, and each writer replaces whole files.
    """
    if "://" in path:
        return nullcontext()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock")


@contextmanager
def new_file(uri: str) -> Iterator[BinaryIO]:
    """Open a file to write, which replaces an earlier one once it is complete."""
    fs, path = open_filesystem(uri)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    draft = f"{path}.{os.getpid()}.tmp" if "file" in fs.protocol else path
    with fs.open(draft, "wb") as sink, dropped_on_failure(sink):
        yield sink
    if draft != path:
        os.replace(draft, path)


def write_table(table: pa.Table, folder: str, part: str = "part-00000") -> None:
    """Write one zstd Parquet file `folder/part.parquet`, whole or not at all."""
    with new_file(join(folder, f"{part}.parquet")) as sink:
        # Training shuffles and bounds its memory by row groups (training/order.py).
        pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP_ROWS)


def data_files(uri: str, endings: tuple[str, ...]) -> list[str]:
    """Return sorted paths, in their filesystem, of the files below `uri` that end in `endings`.

    Files and folders whose name starts with `.` or `_` are left out, because editors, notebooks
    and cluster jobs create them (`.ipynb_checkpoints/`, `_temporary/`, `.part.crc`). A file that
    `uri` itself names is included.
    """
    fs, root = open_filesystem(uri)
    named = [name for name in fs.find(root) if name.lower().endswith(endings)]
    return sorted(n for n in named if not _HIDDEN.search(n.removeprefix(root)))


def table_files(folder: str) -> list[str]:
    """Return `data_files` of a Parquet table; raises InputError if it is missing or has none."""
    if not exists(folder):
        raise InputError("table", folder, "does not exist")
    files = data_files(folder, (".parquet",))
    if not files:
        raise InputError("table", folder, "holds no .parquet file")
    return files


def read_table(
    folder: str, columns: list[str] | None = None, without: Iterable[str] = ()
) -> pa.Table:
    """Read every Parquet file below `folder`; `split=` folders become a column.

    All columns but those of `without` are read unless `columns` are named.

    Raises InputError when the folder is missing or holds no Parquet file.
    """
    # The files are listed, because a manifest or an index beside the table is not Parquet.
    files = table_files(folder)
    fs, path = open_filesystem(folder)
    dataset = ds.dataset(
        files, filesystem=fs, format="parquet", partitioning="hive", partition_base_dir=path
    )
    if columns is None:
        columns = [name for name in dataset.schema.names if name not in set(without)]
    return dataset.to_table(columns=columns)


def write_json(value: Any, uri: str) -> None:
    """Write indented JSON, atomically on a local filesystem."""
    write_bytes(f"{json.dumps(value, indent=2, default=str)}\n".encode(), uri)


def write_lines(values: Iterable[Any], uri: str) -> None:
    """Write a JSON line per value with sorted keys, replacing the file as `write_json` does."""
    lines = (
        json.dumps(value, sort_keys=True, separators=(",", ":"), default=str) for value in values
    )
    write_bytes("".join(f"{line}\n" for line in lines).encode(), uri)


def read_bytes(uri: str) -> bytes:
    """Read a whole file."""
    fs, path = open_filesystem(uri)
    return bytes(fs.cat_file(path))


def write_bytes(content: bytes, uri: str) -> None:
    """Write a file, whole or not at all."""
    with new_file(uri) as sink:
        sink.write(content)


def read_json(uri: str) -> Any:
    """Read JSON; raises InputError when the file is missing or not JSON."""
    fs, path = open_filesystem(uri)
    if not fs.exists(path):
        raise InputError("file", uri, "does not exist")
    with fs.open(path, "r") as source:
        try:
            return json.load(source)
        except json.JSONDecodeError as error:
            raise InputError("file", uri, f"is not JSON ({error})") from None


def content_hash(uri: str) -> str:
    """Return the SHA-256 (16 hex digits) of all files but manifests and what a lost writer left."""
    fs, path = open_filesystem(uri)
    digest = hashlib.sha256()
    files = sorted(fs.find(path)) if fs.isdir(path) else [path]
    for name in files:
        if name.endswith(("manifest.json", ".tmp")) or fs.isdir(name):  # a link to a folder too
            continue
        digest.update(name[len(path) :].encode())
        with fs.open(name, "rb") as source:
            while block := source.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def value_hash(value: Any) -> str:
    """Return the SHA-256 (16 hex digits) of a JSON value, used as the key of a cached step."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_manifest(
    folder: str, kind: str, *, parents: Mapping[str, str] | None = None, **facts: Any
) -> dict[str, Any]:
    """Write and return `folder/manifest.json`; `parents` maps roles to content hashes."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "content_hash": content_hash(folder),
        "parents": dict(parents or {}),
        **facts,
    }
    write_json(manifest, join(folder, "manifest.json"))
    return manifest


def read_manifest(folder: str, kind: str | None = None) -> dict[str, Any]:
    """Read `folder/manifest.json`; raises InputError when its kind is not `kind`."""
    manifest: dict[str, Any] = read_json(join(folder, "manifest.json"))
    if kind is not None and manifest.get("kind") != kind:
        raise InputError("manifest kind", manifest.get("kind"), f"in {folder}", choices=[kind])
    return manifest


@dataclass(frozen=True)
class RunFolder:
    """The paths in a run folder."""

    root: str
    names: Mapping[str, str] = field(default_factory=dict)
    """Names of parts that were made again; `retrieval/parts.py` says which ones serve."""

    def path(self, *parts: str) -> str:
        """Return a path inside the run folder."""
        return join(self.root, *parts)

    @property
    def config(self) -> str:
        return self.path("config.json")

    @property
    def metrics(self) -> str:
        return self.path("metrics.json")

    @property
    def metrics_lines(self) -> str:
        return self.path("metrics.jsonl")

    @property
    def checkpoints(self) -> str:
        return self.path("checkpoints")

    @property
    def bundle(self) -> str:
        return self.path("bundle")

    @property
    def item_embeddings(self) -> str:
        return self.path(self.names.get("item_embeddings", "item_embeddings"))

    @property
    def index(self) -> str:
        return self.path(self.names.get("index", "index"))

    @property
    def report(self) -> str:
        return self.path("report")

    def link_latest(self) -> None:
        """Let `latest`, beside a local run folder, point to it, unless it is not a link."""
        if "://" in self.root:
            return
        root = Path(self.root).resolve()
        link = root.parent / "latest"
        if link.is_symlink():
            link.unlink()
        if not link.exists():
            link.symlink_to(root.name)


def read_lines(uri: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON-lines file; a missing file yields nothing.

    Raises InputError with the number of a line that is not JSON.
    """
    fs, path = open_filesystem(uri)
    if not fs.exists(path):
        return
    with fs.open(path, "r") as source:
        for number, line in enumerate(source, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError("line", f"{uri}:{number}", f"is not JSON ({error})") from None
