"""What a node keeps of files that lie elsewhere: copies, and content hashes.

No disk is shared between the machines of a cluster. Whatever a process opens by a URI and cannot
read from there (weights, tokenizers, files to map into memory) is fetched to its machine once, by
the first process that needs it, while the others wait. Local paths are used as they are.

Both lie in the node's folder (node_disk.py).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from karma_ray.artifacts import (
    absolute,
    content_hash,
    exists,
    join,
    locked,
    open_filesystem,
    read_json,
    value_hash,
)
from karma_ray.errors import InputError
from karma_ray.node_disk import kept, node_folder, remove_path

SETTLED_SECONDS = 5.0
"""Age from which the time of a local file's last change tells it from its earlier contents."""
WHOLE = ("bundle", "checkpoint")
"""Kinds of folders that are fetched whole when a folder in them is needed."""
MODULES = "modules.json"
"""The file that says the same of a folder of sentence-transformers."""
MARKS = ("ETag", "etag", "LastModified", "last_modified", "updated", "mtime", "created")
"""What stores call the property of a file that changes with its content, the surest first."""


def local_copy(uri: str) -> str:
    """Return the path of this node's copy of a file or folder; a local path is returned as it is.

    A copy is kept under the content hash of the folder's manifest, or else under what the store
    says of the files (ETag or time, and size), so a changed source is fetched again. A part of a
    bundle or checkpoint is fetched with the whole. Raises InputError when there is nothing.
    """
    if "://" not in uri:
        return uri
    uri = uri.rstrip("/")
    parent, _, name = uri.rpartition("/")
    if not _is_whole(uri) and _is_whole(parent):
        return join(local_copy(parent), name)
    if not (listing := _listing(uri)):
        raise InputError("file or folder", uri, "does not exist")
    recorded = _recorded(uri)
    target = node_folder() / "copies" / (recorded or value_hash([uri, listing])) / name
    fetch(uri, target, recorded)
    return str(target)


def fetch(uri: str, target: Path, content: str | None = None) -> None:
    """Copy a file or folder to `target` unless it is there; one process of the node does.

    Raises InputError if its content hash is not `content`.
    """

    def make() -> None:
        fs, path = open_filesystem(uri)
        draft = target.with_name(f"{target.name}.tmp")
        remove_path(draft)
        names = sorted(fs.find(path)) if fs.isdir(path) else [path]
        for name in names:
            file = Path(f"{draft}{name[len(path) :]}")
            file.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(name, str(file))
        if content is not None and content_hash(str(draft)) != content:
            remove_path(draft)
            raise InputError("folder", uri, "holds other files than its manifest.json says")
        os.replace(draft, target)

    kept(target, make)


def upload(source: Path, uri: str) -> None:
    """Copy a local file or folder to a URI; manifests last, as they mark a folder complete."""
    fs, path = open_filesystem(uri)
    files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
    for file in sorted(files, key=lambda p: (p.name == "manifest.json", -len(p.parts), str(p))):
        below = file.relative_to(source).as_posix()
        target = path if file == source else f"{path}/{below}"
        fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        fs.put_file(str(file), target)
    fs.invalidate_cache()


@contextmanager
def complete_folder(uri: str) -> Iterator[str]:
    """Yield the name of a local folder to be made, which appears at `uri` when it is complete."""
    if "://" in uri:
        with tempfile.TemporaryDirectory() as folder:
            yield (draft := join(folder, "draft"))
            upload(Path(draft), uri)
        return
    draft = f"{uri}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        yield draft
        shutil.rmtree(uri, ignore_errors=True)
        os.replace(draft, uri)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def known_hash(uri: str) -> str:
    """Return `content_hash`, computed once per node while names, sizes and times stay the same."""
    uri, began = absolute(uri), time.time()
    open_filesystem(uri)[0].invalidate_cache()
    listing = _listing(uri)
    ages = [began - float(facts[-1]) for facts in listing if isinstance(facts[-1], float)]
    unknown = any(facts[-1] is None for facts in listing)  # such as files in memory
    if not listing or unknown or min(ages, default=SETTLED_SECONDS) < SETTLED_SECONDS:
        return content_hash(uri)
    path = node_folder() / "hashes" / value_hash([uri, listing])
    if not path.exists():
        with locked(str(path)):
            if not path.exists():
                draft = path.with_suffix(".tmp")
                draft.write_text(content_hash(uri), encoding="utf-8")
                os.replace(draft, path)
    return path.read_text(encoding="utf-8")


def checkpoint_hash(checkpoint: str) -> str:
    """Return the content hash of a checkpoint folder; a hub name is told by itself."""
    checkpoint = local_copy(checkpoint)
    return known_hash(checkpoint) if Path(checkpoint).is_dir() else checkpoint


def _listing(uri: str) -> list[list[Any]]:
    """Return name, size and mark of every file; the mark changes with the content."""
    fs, path = open_filesystem(uri)
    try:
        found = fs.find(path, detail=True) if fs.isdir(path) else {path: fs.info(path)}
    except FileNotFoundError:
        return []
    mark = _changed if "file" in fs.protocol else _marked
    return [
        [name[len(path) :], facts["size"], *mark(name, facts)]
        for name, facts in sorted(found.items())
    ]


def _changed(path: str, facts: dict[str, Any]) -> tuple[int, float]:
    status = os.stat(path)  # of a link, that of the file itself
    return status.st_ino, status.st_mtime


def _marked(path: str, facts: dict[str, Any]) -> tuple[str | None]:
    return (next((str(facts[name]) for name in MARKS if facts.get(name)), None),)


def _is_whole(uri: str) -> bool:
    manifest = join(uri, "manifest.json")
    if exists(manifest):
        return read_json(manifest).get("kind") in WHOLE
    return exists(join(uri, MODULES))


def _recorded(uri: str) -> str | None:
    """Return the content hash of a folder's manifest, if it is one of ours."""
    manifest = join(uri, "manifest.json")
    facts = read_json(manifest) if exists(manifest) else {}
    return str(facts["content_hash"]) if "schema_version" in facts else None
