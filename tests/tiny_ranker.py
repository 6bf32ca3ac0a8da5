"""A tiny CTR model beside the tiny run: a finished RUN2 of which only ranker/ is there."""

from __future__ import annotations

from pathlib import Path

import torch

from karma_ray.artifacts import RunFolder, join, read_manifest, write_table
from karma_ray.data.catalog import Catalog
from karma_ray.ranking.config import RankingConfig
from karma_ray.ranking.families import Sizes, build_model, family_of
from karma_ray.ranking.features import num_features
from karma_ray.ranking.load import save_ranker
from karma_ray.ranking.qarm import Qarm
from tests import tiny_run

SIZES = [3, 2]


def write_items(root: Path) -> str:
    """Write the catalogue of the ranker, which has the items of the run in another order."""
    items = tiny_run.items_table()
    uri = str(root / "ranked")
    write_table(items.take(list(reversed(range(items.num_rows)))), join(uri, "items"))
    return uri


def write_ranker(
    root: Path, run: str, config: RankingConfig, items_uri: str, **parents: str
) -> str:
    """Write RUN2, whose model reads the vectors of `run` if its family does; returns RUN2."""
    catalog = Catalog.load(items_uri)
    is_coded = family_of(config).uses_codes
    sizes = Sizes(catalog.num_items, SIZES, 8 if is_coded else 0, codes=[5, 4] * is_coded)
    model = build_model(config, sizes, seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=draw))
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight[0] = 0.0  # stands for nothing
        if isinstance(model, Qarm):
            model.vectors[1:].normal_(generator=draw)
            model.items.codes[1:] = torch.randint(1, 5, (sizes.num_items, 2), generator=draw)
    count = 0
    if family_of(config).uses_vectors:
        count = num_features(config.interest)
        made = read_manifest(RunFolder(run).item_embeddings)["content_hash"]
        parents = {"item_embeddings": made, **parents}
    ids = catalog.table.column("item_id").combine_chunks()
    folder = str(root / "run2")
    save_ranker(model, config, sizes, count, ids, join(folder, "ranker"), parents)
    return folder
