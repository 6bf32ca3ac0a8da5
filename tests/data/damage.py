"""Damage to Parquet files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


def spoil(file: Path, group: int) -> None:
    """Overwrite the pages of one row group."""
    content = bytearray(file.read_bytes())
    column = pq.read_metadata(file).row_group(group).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    noise = np.random.default_rng(0).bytes(column.total_compressed_size)
    content[start : start + len(noise)] = noise
    file.write_bytes(bytes(content))
