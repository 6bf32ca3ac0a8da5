"""QARM V2 in the ranker (2602.08559): semantic ids as trainable embeddings, and search by vector.

    GSU: S(c) = the n clicks j of a long history with the largest cos(e_j, e_c)
    ESU: x_i = id + attributes + sum over levels l of E_l[code_l(i)];  attention of x_c over S(c)

Vectors and codes are buffers, so that weights alone serve, and the vectors get no gradient. The
search runs once for all candidates of a batch, page by page in one product. The last clicks are
read by DIN as in every other family.

Legend: R pages, N candidates, T long history, G = n found clicks, C most candidates of a page,
I items, L levels, D width, E width of e_i.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from karma_ray.artifacts import RunFolder, exists, read_manifest
from karma_ray.codes.table import MANIFEST_KIND, ItemCodes, load_codes
from karma_ray.data.catalog import Catalog
from karma_ray.data.item_lookup import ItemLookup
from karma_ray.errors import InputError
from karma_ray.ranking.config import NO_CODES
from karma_ray.ranking.din import INPUTS, Din, TargetAttention
from karma_ray.ranking.items import ItemEmbedding, ItemFacts, new_table
from karma_ray.ranking.vectors import in_order_of
from karma_ray.retrieval.aligned import FOLDERS as ALIGNED
from karma_ray.retrieval.parts import served
from karma_ray.retrieval.similarity import unit

if TYPE_CHECKING:
    from karma_ray.ranking.config import RankingConfig

CODES = "item_codes"
"""Folder of a run's codes where `ranking.codes` names none."""


class CodedItems(nn.Module):
    """An item's embedding with those of its semantic ids added; 0 for row -1."""

    codes: Tensor

    def __init__(self, base: ItemEmbedding, num_items: int, sizes: list[int]) -> None:
        """`sizes` are the codes of each level; `know` gives the items theirs."""
        super().__init__()
        self.base, self.width = base, base.width
        self.of_level = nn.ModuleList([new_table(size, base.width) for size in sizes])
        self.register_buffer("codes", torch.zeros(num_items + 1, len(sizes), dtype=torch.long))

    @property
    def attributes(self) -> Tensor:
        """The attributes of the items, after those of row -1."""
        return self.base.attributes

    def know(self, facts: ItemFacts) -> None:
        """Take the attributes and the codes of the items."""
        self.base.know(facts)
        if facts.codes is not None:
            self.codes[1:] = torch.from_numpy(facts.codes.codes.astype(np.int64)) + 1

    def forget(self, rows: np.ndarray) -> None:
        """Leave out ids that were never shown, and codes that only such items have."""
        self.base.forget(rows)
        known = torch.ones(len(self.codes), dtype=torch.bool)
        known[torch.from_numpy(rows) + 1] = False
        with torch.no_grad():
            for level, table in enumerate(self.of_level):
                weight = cast(nn.Embedding, table).weight
                unseen = torch.ones(len(weight), dtype=torch.bool)
                unseen[self.codes[known, level]] = False
                weight[unseen] = 0.0

    def forward(self, rows: Tensor) -> Tensor:
        """Embed catalogue rows.  # [...] -> [..., D]"""
        found: Tensor = self.base(rows)
        codes = nn.functional.embedding(rows + 1, self.codes)
        for level, table in enumerate(self.of_level):
            found = found + table(codes[..., level])
        return found


class Qarm(nn.Module):
    """DIN over the last clicks, and over the clicks nearest to each candidate."""

    inputs = INPUTS
    vectors: Tensor

    def __init__(self, config: RankingConfig, items: CodedItems, vector_width: int) -> None:
        super().__init__()
        self.recent, self.found = config.recent_items, config.gsu_items
        self.din = Din(config, items, nn.Identity(), 2 * config.width if self.found else 0)
        if self.found:
            self.nearby = TargetAttention(config.width, config.attention_hidden)
            self.register_buffer("vectors", torch.zeros(len(items.codes), vector_width))

    @property
    def items(self) -> CodedItems:
        """What embeds the items."""
        return cast(CodedItems, self.din.items)

    def know(self, facts: ItemFacts) -> None:
        """Take the vectors of the items."""
        if self.found and facts.vectors is not None:
            self.vectors[1:] = torch.from_numpy(facts.vectors)

    def forward(
        self, history: Tensor, query: Tensor, request: Tensor, candidate: Tensor, features: Tensor
    ) -> Tensor:
        """Return logits.  # [R, T], [R, Q], [N], [N], [N, 0] -> [N]"""
        if self.found:
            features = self.nearest_interest(history, request, candidate)
        logits: Tensor = self.din(history[:, -self.recent :], query, request, candidate, features)
        return logits

    def nearest_interest(self, history: Tensor, request: Tensor, candidate: Tensor) -> Tensor:
        """Return the interest of the clicks nearest to each candidate, and its product with it.

        [R, T], [N], [N] -> [N, 2 D]
        """
        rows = nearest(self.vectors, history, request, candidate, self.found)  # [N, G]
        keys, item = self.items(rows), self.items(candidate)
        there = (rows >= 0).to(keys.dtype)
        interest = self.nearby(
            keys, there, item, torch.arange(candidate.shape[0], device=request.device)
        )
        return torch.cat([interest, interest * item], -1)


@torch.fx.wrap
def nearest(
    vectors: Tensor, history: Tensor, request: Tensor, candidate: Tensor, count: int
) -> Tensor:
    """Return the rows of the clicks with the largest cosine to each candidate; -1 where fewer.

    `vectors` are of length 1 after that of row -1. An unknown candidate has none.

    [I + 1, E], [R, T], [N], [N] -> [N, G]
    """
    num_requests, device = history.shape[0], history.device
    sizes = torch.bincount(request, minlength=num_requests)
    place = torch.arange(len(request), device=device) - (sizes.cumsum(0) - sizes)[request]
    most = int(sizes.max()) if num_requests else 0
    padded = candidate.new_full((num_requests, most), -1)
    padded[request, place] = candidate
    with torch.no_grad():
        of_click, of_item = vectors[history + 1], vectors[padded + 1]
        cosines = torch.bmm(of_item, of_click.transpose(1, 2))[request, place]  # [N, T]
    clicks = history[request]
    cosines = cosines.masked_fill((clicks < 0) | (candidate < 0).unsqueeze(1), -torch.inf)
    best = cosines.topk(min(count, history.shape[1]), dim=1)
    rows = clicks.gather(1, best.indices).masked_fill(best.values == -torch.inf, -1)
    return nn.functional.pad(rows, (0, count - rows.shape[1]), value=-1)


def with_codes(facts: ItemFacts, config: RankingConfig, data: str, cache: str) -> ItemFacts:
    """Return facts with the codes of `ranking.codes`, and the vectors that they were made of.

    These are the run's own embeddings or its aligned ones. Raises InputError on codes of others,
    and on those of another catalogue.
    """
    embeddings = served(config.vectors).item_embeddings
    if config.codes == NO_CODES:
        if not config.gsu_items:
            problem = f"leaves the model nothing to read beside ranking.codes={NO_CODES}"
            raise InputError("ranking.gsu_items", 0, problem)
        parents = {"embeddings": read_manifest(embeddings)["content_hash"]}
        return replace(facts, vectors=_vectors(embeddings, config.vectors, data), parents=parents)
    folder = config.codes or RunFolder(config.vectors).path(CODES)
    if not exists(f"{folder}/manifest.json"):
        problem = "is no finished folder of codes; `python jobs/codes.py RUN` makes one"
        raise InputError("--codes", folder, problem)
    manifest = read_manifest(folder, MANIFEST_KIND)
    embeddings = _made_of(folder, config.vectors, manifest["parents"]["embeddings"])
    parents = {"item_codes": manifest["content_hash"], **manifest["parents"]}
    vectors = _vectors(embeddings, config.vectors, data) if config.gsu_items else None
    codes = _in_order(load_codes(folder), folder, data)
    return replace(facts, vectors=vectors, codes=codes, parents=parents)


def _made_of(folder: str, run: str, wanted: str) -> str:
    """Return the embeddings of a run that codes were made of."""
    choices = (served(run).item_embeddings, *map(RunFolder(run).path, ALIGNED))
    for embeddings in choices:
        there = exists(f"{embeddings}/manifest.json")
        if there and read_manifest(embeddings)["content_hash"] == wanted:
            return embeddings
    raise InputError(
        "--codes", folder, f"holds codes of other embeddings than those of --vectors {run}: make "
        f"them again with `python jobs/codes.py {run}`",
    )  # fmt: skip


def _vectors(embeddings: str, run: str, data: str) -> np.ndarray:
    return unit(in_order_of(embeddings, run, data).embeddings)


def _in_order(codes: ItemCodes, folder: str, data: str) -> ItemCodes:
    ids = Catalog.load(data).item_ids
    rows = ItemLookup(pa.chunked_array([pa.array(codes.item_ids)])).rows(pa.array(ids))
    if len(ids) != len(codes.item_ids) or (rows < 0).any():
        problem = f"has codes of another catalogue than {data}"
        raise InputError("--codes", folder, problem)
    return ItemCodes(ids, codes.codes[rows], codes.sizes)
