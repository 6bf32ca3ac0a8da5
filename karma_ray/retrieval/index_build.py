"""The index of a finished run: its kind, and its recall on requests that were held out.

Legend: B requests, K vectors of a request, D width.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from karma_ray.artifacts import RunFolder, exists, join, read_manifest
from karma_ray.data.collate import Collator
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError
from karma_ray.model.device import this_device
from karma_ray.model.recall import RecallModel
from karma_ray.node_cache import known_hash
from karma_ray.retrieval.blend import Blend
from karma_ray.retrieval.blend_fit import fitted_blend
from karma_ray.retrieval.channels import Channels
from karma_ray.retrieval.encode import ItemTable, load_embeddings
from karma_ray.retrieval.export import Bundle, load_bundle
from karma_ray.retrieval.index import ItemIndex
from karma_ray.retrieval.index_recall import ProbeQueries, item_probes
from karma_ray.retrieval.kinds import Flat, IndexKind, chosen_kind
from karma_ray.retrieval.parts import channels_of, serve_from, to_index
from karma_ray.retrieval.retriever import Retriever, build_index, require_part, score_vectors

LOG = logging.getLogger(__name__)
MIN_RECALL = 0.95
"""The recall@200 that an index promises unless told otherwise."""
NUM_PROBE_REQUESTS = 512
"""Validation requests that measure the recall of an index."""
BATCH = 64


def index_run(
    run: str,
    kind: IndexKind | None = None,
    device: torch.device | str | None = None,
    *,
    data: str | None = None,
    min_recall: float = MIN_RECALL,
    num_shards: int = 1,
) -> ItemIndex:
    """Build and save the index of a run's newest embeddings; both then serve together.

    Without `kind` the size of the catalogue decides, knobs are raised until the recall is
    `min_recall`, and exact search takes over if it never is. `data` are prepared data with
    validation requests (default: the run's). Raises InputError if the recall of a kind that was
    asked for is below `min_recall`; the earlier index then stays.
    """
    if not 0 <= min_recall <= 1:
        raise InputError("--min-recall", min_recall, "must lie between 0 and 1")
    folder = to_index(run)
    require_part(run, folder.bundle, "jobs/train.py --out RUN")
    require_part(run, folder.item_embeddings, "jobs/embed.py RUN")
    bundle = load_bundle(folder.bundle)
    table = load_embeddings(folder.item_embeddings, bundle.content_hash)
    made = read_manifest(folder.item_embeddings)["content_hash"]
    parents = {"bundle": bundle.content_hash, "item_embeddings": made}
    interest = bundle.interest.to(this_device(device))
    vectors = score_vectors(interest, table)

    def build(wanted: IndexKind, probes: ProbeQueries | None) -> ItemIndex:
        return ItemIndex.build(
            vectors, table.item_ids, table.titles, wanted, parents, categories=table.categories,
            num_shards=num_shards, probes=probes, min_recall=min_recall,
            raise_recall=kind is None,
        )  # fmt: skip

    wanted = kind or chosen_kind(len(vectors), vectors.shape[1], _decoder_weights(interest))
    probes = None if isinstance(wanted, Flat) else _probes(bundle, table, run, data, vectors)
    try:
        index = build(wanted, probes)
    except InputError as error:
        if kind is not None:
            raise
        LOG.warning("%s; this index searches exactly instead", error)
        index = build(Flat(), None)
    saved = index.save(folder.index)
    try:
        prepared = PreparedData.load(data or _data_of(run))
        collator = Collator(table, bundle.tokenizer, bundle.collate_config)
        add_channels(channels_of(folder), Retriever(interest, collator, table, saved), prepared)
    except (InputError, OSError) as error:
        LOG.warning("this index answers without other channels: %s", error)
    serve_from(folder)
    return saved


def add_channels(folder: str, retriever: Retriever, data: PreparedData) -> Blend:
    """Write the channels of a retriever's index, and the weights that validation gives them.

    Raises InputError if the data lack an item of the index.
    """
    parents = {
        **retriever.index.parents, "index": retriever.index.content_hash,
        "items": known_hash(join(data.items_uri, "items")),
    }  # fmt: skip
    channels = Channels.of(data, retriever.index.item_ids, parents)
    blend = fitted_blend(retriever, channels, data.examples("valid"))
    channels.save(folder, blend.to_json())
    LOG.info("%s", blend.verdict)
    return blend


def held_out_interests(bundle: Bundle, table: ItemTable, data: str) -> np.ndarray:  # [B K, D]
    """Return what validation requests of prepared data search with, evenly spaced ones.

    Raises InputError if the data are missing, not prepared, or have no validation requests.
    """
    examples = PreparedData.load(data).examples("valid")
    if examples.num_rows == 0:
        raise InputError("--data", data, "has no validation requests")
    count = min(NUM_PROBE_REQUESTS, examples.num_rows)
    examples = examples.take(np.linspace(0, examples.num_rows - 1, count).astype(int))
    collator = Collator(table, bundle.tokenizer, bundle.collate_config)
    model = bundle.interest
    retriever = Retriever(model, collator, table, build_index(model, table))
    found = []
    for start in range(0, count, BATCH):
        some = examples.slice(start, BATCH)
        keys = retriever.keys(some) if model.is_random else None
        with torch.inference_mode():
            found.append(model.search_vectors(retriever.interests(some), keys).float().cpu())
    return torch.cat(found).flatten(0, 1).numpy()


def _probes(
    bundle: Bundle, table: ItemTable, run: str, data: str | None, vectors: np.ndarray
) -> ProbeQueries:
    """Return held-out interests; without data that were asked for, item vectors, and why."""
    try:
        queries = held_out_interests(bundle, table, data or _data_of(run))
    except (InputError, OSError) as error:
        if data is not None:
            raise
        LOG.warning("recall is measured on item vectors, which are easier than requests: %s", error)
        probes = item_probes(vectors)
        return ProbeQueries(probes.vectors, f"{probes.what} ({error})")
    return ProbeQueries(queries, f"{len(queries)} vectors of validation requests")


def _data_of(run: str) -> str:
    """Return the prepared data that the run's manifest names."""
    facts = read_manifest(run) if exists(RunFolder(run).path("manifest.json")) else {}
    if not facts.get("data"):
        raise InputError("--data", None, f"is needed: {run} does not name its data")
    return str(facts["data"])


def _decoder_weights(interest: RecallModel) -> int:
    """Return the number of weights that a request passes, without those of the item encoder."""
    decoder = getattr(interest, "user_decoder", interest)
    return sum(weight.numel() for weight in decoder.parameters())
