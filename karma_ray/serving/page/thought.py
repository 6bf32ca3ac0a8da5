"""What the model thinks that the user wants: h_t decoded to text, where a run kept its decoder.

The decoder is no part of what serves. It is loaded when somebody first asks, with a model and a
tokenizer of its own, so that recall shares nothing with it.
"""

from __future__ import annotations

import torch

from karma_ray.artifacts import RunFolder, exists, join, read_json, read_manifest
from karma_ray.config import from_dict
from karma_ray.data.collate import Collator
from karma_ray.errors import KarmaRayError
from karma_ray.retrieval.encode import ItemTable
from karma_ray.retrieval.requests import Request, request_table


def speaks(run: str | None) -> bool:
    """Whether a run learnt to decode text from h_t (Task 2) and kept the weights that do."""
    if run is None:
        return False
    folder = RunFolder(run)
    final = join(folder.checkpoints, "joint", "final")
    try:
        if not exists(join(final, "aliases.json")):
            return False
        config = from_dict(read_json(folder.config))
    except (OSError, ValueError, KarmaRayError):
        return False
    return config.model.kind == "karma" and config.objective.built.reconstruction


class Thoughts:
    """A run's whole model, decoders included. For one thread."""

    def __init__(self, run: str, table: ItemTable) -> None:
        """`table` holds the item embeddings of the same run."""
        from karma_ray.runs.stages import finished_stage  # seconds, for this alone

        items = str(read_manifest(run).get("items") or "")
        stage = finished_stage(run, items)
        self._model = stage.build_trained()
        self._collator = Collator(table, stage.tokenizer(), stage.config.collate)
        self._embeddings = torch.from_numpy(table.embeddings)

    def of(self, request: Request) -> str:
        """Return the text that is decoded from h_t of a request."""
        with torch.inference_mode():
            batch = self._collator.requests(request_table([request]))
            items = self._embeddings[batch.item_rows]
            interest = self._model.interest.last_interest(batch, items)
            return self._model.speak(interest, batch)[0]
