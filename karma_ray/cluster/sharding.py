"""Preparation on Ray Data, whose tasks check fragments and build partitions of users.

The catalogue's ids are broadcast once, and no task handles single users. On a small machine a
shuffle costs 5-15 seconds for any amount of data.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import ray

from karma_ray.cluster.session import connect
from karma_ray.data.fragments import Fragment
from karma_ray.data.prepared import PreparedData
from karma_ray.data.sessions import PrepareConfig
from karma_ray.runs import preparation
from karma_ray.runs.preparation import FragmentCheck, PartitionBuild


def ensure_prepared(data_uri: str, config: PrepareConfig) -> PreparedData:
    """Call `karma_ray.runs.preparation.ensure_prepared` on Ray Data."""
    return preparation.ensure_prepared(data_uri, config, RayShuffle())


def prepare(
    data_uri: str, config: PrepareConfig, out: str | None = None, progress: bool = True
) -> dict[str, Any]:
    """Call `karma_ray.runs.preparation.prepare` on Ray Data, with progress bars on a terminal."""
    return preparation.prepare(data_uri, config, out, RayShuffle(progress))


class RayShuffle:
    """A shuffle on Ray Data that keeps the clean events in the object store."""

    def __init__(self, progress: bool = True) -> None:
        self._progress = progress

    def check(self, fragments: Sequence[Fragment], check: FragmentCheck, partitions: int) -> Any:
        """Run a task per fragment; returns a materialised Ray Dataset."""
        connect()
        _show_progress(self._progress)
        described = [asdict(fragment) for fragment in fragments]
        return (
            ray.data.from_items(described, override_num_blocks=len(described))
            .map_batches(
                _check_fragment,
                batch_size=1,
                batch_format="pyarrow",
                fn_kwargs={
                    "check": replace(check, item_ids=None),
                    "item_ids": ray.put(check.item_ids),
                },
            )
            .materialize()
        )

    def build(self, clean: Any, build: PartitionBuild, partitions: int) -> list[dict[str, Any]]:
        """Shuffle by partition once, then run a task per partition."""
        built = clean.groupby("partition", num_partitions=partitions).map_groups(
            _build,
            batch_format="pyarrow",
            fn_kwargs={
                "build": replace(build, held_out=None),
                "held_out": None if build.held_out is None else ray.put(build.held_out),
            },
        )
        return list(built.take_all())


def _check_fragment(batch: pa.Table, check: FragmentCheck, item_ids: ray.ObjectRef) -> pa.Table:
    """Run as a task: return the clean rows of one fragment, given by its reference."""
    (described,) = batch.to_pylist()
    return replace(check, item_ids=ray.get(item_ids))(Fragment(**described))


def _build(group: pa.Table, build: PartitionBuild, held_out: ray.ObjectRef | None) -> pa.Table:
    """Run as a task: write the files of one partition and return its counts."""
    return replace(build, held_out=None if held_out is None else ray.get(held_out))(group)


def _show_progress(progress: bool) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = progress and sys.stderr.isatty()
    context.print_on_execution_start = False
    # Otherwise every execution logs that it ended and that it shows no bar.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
