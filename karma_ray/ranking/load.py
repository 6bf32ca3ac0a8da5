"""The folder `ranker/` of a run: a CTR model that serves, without its training data.

    config.json          family and sizes (RankingConfig), sizes of the data
    model.safetensors    weights, and what the catalogue says of the items
    item_ids/            the id of every row, in the order of the rows
    manifest.json        kind `ranker`; parents: items, and item_embeddings if it reads features

Legend: N candidates, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from karma_ray.artifacts import (
    exists,
    join,
    read_json,
    read_manifest,
    read_table,
    write_bytes,
    write_json,
    write_manifest,
    write_table,
)
from karma_ray.data.item_lookup import ItemLookup
from karma_ray.errors import InputError
from karma_ray.node_cache import local_copy
from karma_ray.ranges import validated
from karma_ray.ranking.batch import CtrBatch
from karma_ray.ranking.collate import CtrCollator
from karma_ray.ranking.config import RankingConfig
from karma_ray.ranking.exposures import EXPOSURES
from karma_ray.ranking.families import Sizes, build_to_serve, family_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

KIND = "ranker"


def logits_of(model: nn.Module, batch: CtrBatch) -> Tensor:  # -> [N]
    """Return the logits of a batch's candidates in float32."""
    logits: Tensor = model(*batch.named(model.inputs)).float()  # type: ignore[arg-type]
    return logits


@dataclass(frozen=True)
class Ranker:
    """A trained CTR model by item ids."""

    model: nn.Module
    config: RankingConfig
    collator: CtrCollator
    item_ids: pa.Array
    manifest: dict[str, Any]

    @cached_property
    def _lookup(self) -> ItemLookup:
        return ItemLookup(pa.chunked_array([self.item_ids]), None)

    @property
    def num_features(self) -> int:
        """F: how many features of a candidate the model reads (ranking/features.py)."""
        return self.collator.num_features

    def rows(self, ids: Sequence[str]) -> NDArray[np.int64]:  # [n]
        """Return the model's row of each item; -1 for items that it does not know."""
        return self._lookup.rows(pa.array(ids, pa.string()))

    def batch(
        self,
        query: str | None,
        history: Sequence[str],
        candidates: Sequence[str],
        features: NDArray[np.float32] | None = None,  # [N, F]
    ) -> CtrBatch:
        """Return one request as a batch; `history` is newest last, unknown items are left out."""
        if not family_of(self.config).serves:
            message = "reads what comes after a request, so it cannot answer one"
            raise InputError("ranking.family", self.config.family, message)
        known = self.rows(history)
        row: dict[str, Any] = dict.fromkeys(EXPOSURES.names)
        row |= {
            "query": query, "history_rows": known[known >= 0],
            "later_rows": [], "later_sessions": [],
            "candidate_rows": self.rows(candidates), "clicked": [False] * len(candidates),
        }  # fmt: skip
        table = pa.Table.from_pylist([row], schema=EXPOSURES)
        if self.num_features:
            if features is None or features.shape != (len(candidates), self.num_features):
                raise InputError("features", features, f"are needed, {self.num_features} each")
            column = pa.array([features.reshape(-1)], pa.list_(pa.float32()))
            table = table.append_column("features", column)
        return self.collator(table)

    def probabilities(self, batch: CtrBatch) -> NDArray[np.float32]:  # [N]
        """Return the chance of a click of every candidate."""
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            chance = torch.sigmoid(logits_of(self.model, batch.to(device)))
        result: NDArray[np.float32] = chance.cpu().numpy()
        return result


def _read(model: nn.Module, columns: Mapping[str, str]) -> dict[str, str]:
    """Leave out columns that only training reads, so that none reaches a model that serves."""
    inputs: tuple[str, ...] = model.inputs  # type: ignore[assignment]
    return {name: column for name, column in columns.items() if name in inputs}


def save_ranker(
    model: nn.Module, config: RankingConfig, sizes: Sizes, num_features: int,
    item_ids: pa.Array, folder: str, parents: Mapping[str, str], **facts: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write the folder of a trained model; returns its manifest, which is written last."""
    from safetensors.torch import save

    weights = {name: value.detach().cpu().contiguous() for name, value in
               model.state_dict().items()}  # fmt: skip
    write_bytes(save(weights), join(folder, "model.safetensors"))
    write_table(pa.table({"item_id": item_ids}), join(folder, "item_ids"))
    saved = {"ranking": asdict(config), "sizes": asdict(sizes), "num_features": num_features}
    write_json(saved, join(folder, "config.json"))
    return write_manifest(folder, KIND, parents=parents, **facts)


def load_ranker(run: str, device: torch.device | str = "cpu") -> Ranker:
    """Load the ranker of a run; raises InputError when the run has none."""
    folder = join(run, KIND)
    if not exists(join(folder, "manifest.json")):
        raise InputError(
            "RUN", run, "has no finished ranker/; `python jobs/train.py --recipe ctr_din` makes one"
        )
    manifest, saved = read_manifest(folder, KIND), read_json(join(folder, "config.json"))
    config = validated(RankingConfig, saved["ranking"], "ranking")
    model = build_to_serve(config, Sizes(**saved["sizes"]))
    from safetensors.torch import load

    here = Path(local_copy(folder), "model.safetensors")
    model.load_state_dict(load(here.read_bytes()))
    collator = CtrCollator(config, saved["num_features"], _read(model, family_of(config).columns))
    ids = read_table(join(folder, "item_ids")).column("item_id").combine_chunks()
    return Ranker(model.to(device).eval(), config, collator, ids, manifest)
