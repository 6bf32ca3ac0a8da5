"""Files of checkpoints on a local disk or an object store, and the check that they are complete."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from karma_ray.artifacts import join, open_filesystem
from karma_ray.training.checkpoints.checkpoint import MARKER

BLOCK_BYTES = 4 * 1024 * 1024


class IncompleteCheckpoint(Exception):
    """Raised when a file of a checkpoint is missing or differs from what was written."""


def step_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:07d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint folder's name, or None for other names."""
    match = re.fullmatch(r"step-(\d+)", name)
    return int(match[1]) if match else None


def checksum(content: bytes) -> str:
    """Return the BLAKE2b checksum as 32 hex digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class CheckpointFiles:
    """The folder or URI of a stage's checkpoints. Methods try once; callers retry."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.fs, self.path = open_filesystem(folder)
        self.is_local = "file" in self.fs.protocol
        self.poll_seconds = 0.05 if self.is_local else 1.0

    def steps(self) -> list[int]:
        """Return the steps that have a folder, committed or not, in order."""
        self.fs.invalidate_cache()  # clients of object stores cache listings
        try:
            names = self.fs.ls(self.path, detail=False)
        except FileNotFoundError:
            return []
        found = [step_of(name.rstrip("/").rsplit("/", 1)[-1]) for name in names]
        return sorted(step for step in found if step is not None)

    def has_marker(self, step: int) -> bool:
        """Whether the step was committed."""
        return self.document(f"{step_name(step)}/{MARKER}") is not None

    def document(self, name: str) -> dict[str, Any] | None:
        """Read a JSON object; None when the file is absent or is not a JSON object."""
        try:
            found = json.loads(self.get(join(self.folder, name)))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write(self, name: str, content: bytes) -> None:
        """Write one file."""
        self.put(join(self.folder, name), content)

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it is there."""
        path = f"{self.path}/{name}"
        self.fs.invalidate_cache()
        if self.fs.exists(path):
            self.fs.rm(path, recursive=True)

    def remove_parts(self, name: str, of: int) -> None:
        """Remove the files that worker `of` wrote for a step."""
        self.fs.invalidate_cache()
        own = re.compile(rf"(model|optimizer)-{of:05d}-.*|(random|done)-{of}\..*")
        for path in self.fs.ls(f"{self.path}/{name}", detail=False):
            if own.fullmatch(path.rsplit("/", 1)[-1]):
                self.fs.rm(path)

    @staticmethod
    def get(uri: str) -> bytes:
        """Read one file; raises FileNotFoundError."""
        fs, path = open_filesystem(uri)
        content: bytes = fs.cat_file(path)
        return content

    @staticmethod
    def put(uri: str, content: bytes) -> None:
        """Write one file; on a local disk atomically and synced to the disk."""
        fs, path = open_filesystem(uri)
        if "file" not in fs.protocol:
            fs.pipe_file(path, content)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as sink:
                sink.write(content)
                sink.flush()
                # Older checkpoints are removed afterwards, so this one must be on the disk.
                os.fsync(sink.fileno())
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise


def fetched(files: CheckpointFiles, name: str, opened: ExitStack, verified: bool = True) -> Path:
    """Return the checkpoint as a local folder, downloading it if necessary.

    Downloads are always checked against the manifest, a local folder only when `verified`.
    Raises IncompleteCheckpoint.
    """
    manifest = files.document(f"{name}/{MARKER}")
    if manifest is None or not isinstance(manifest.get("files"), dict):
        raise IncompleteCheckpoint(f"it has no {MARKER}: its writer was interrupted")
    if files.is_local:
        target = Path(files.path, name)
    else:
        target = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        (target / MARKER).write_text(json.dumps(manifest), encoding="utf-8")
    for file, facts in manifest["files"].items():
        if not files.is_local:
            try:
                files.fs.get_file(f"{files.path}/{name}/{file}", str(target / file))
            except FileNotFoundError:
                raise IncompleteCheckpoint(f"{file} is missing") from None
        if verified or not files.is_local:
            _check(target / file, facts)
    return target


def _check(file: Path, facts: dict[str, Any]) -> None:
    if not file.exists():
        raise IncompleteCheckpoint(f"{file.name} is missing")
    size = file.stat().st_size
    if size != facts["size"]:
        raise IncompleteCheckpoint(f"{file.name} has {size} bytes, not {facts['size']}")
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as source:
        while block := source.read(BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != facts["blake2b"]:
        raise IncompleteCheckpoint(f"{file.name} does not match its checksum")
