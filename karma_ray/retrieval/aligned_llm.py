"""The embeddings of a run whose LLM is fine-tuned on co-clicks: pairs, tuning, encoding.

Legend: I items, P pairs, D width of e.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from karma_ray.artifacts import RunFolder, exists, read_json
from karma_ray.codes.alignment import held_out, pair_recall
from karma_ray.codes.information import by_chance, mutual_information
from karma_ray.codes.pairs import relevant, text_similarity
from karma_ray.codes.summarizer import Summarizer
from karma_ray.codes.tuning import ItemTexts, TuningConfig, embeddings, generation_loss, tune
from karma_ray.data.catalog import Catalog
from karma_ray.data.prompts import SpecialIds
from karma_ray.data.tokens import catalog_tokens
from karma_ray.errors import InputError
from karma_ray.model.backbone import load_body
from karma_ray.model.backbones.checkpoints import load_lm_head
from karma_ray.model.backbones.sentence_folder import own_fields
from karma_ray.model.device import this_device
from karma_ray.model.interest import InterestModel
from karma_ray.retrieval.encode import ItemTable, encode_catalog
from karma_ray.retrieval.export import Bundle, load_bundle
from karma_ray.retrieval.parts import served

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from karma_ray.codes.pairs import Pairs

LOG = logging.getLogger(__name__)
FITTED_ON = 16_384
"""Items, evenly spaced, that a map to the run's own vectors is fitted on."""


@dataclass(frozen=True)
class PretrainedLlm:
    """The LLM that a run's item encoder started from, as it was before the run."""

    checkpoint: str
    body: nn.Module
    head: Tensor | None  # [V, d]; None: the rows for tokens

    @classmethod
    def of(cls, run: str) -> PretrainedLlm | None:
        """Load it; None where weights are from scratch, or no language model can be had."""
        checkpoint = _checkpoint(run)
        if checkpoint is None:
            return None
        local = "://" in checkpoint or Path(checkpoint).is_dir()
        try:
            if local and own_fields(checkpoint):
                raise InputError("checkpoint", checkpoint, "is an encoder of sentences")
            device = this_device()
            body, head = load_body(checkpoint).to(device).eval(), load_lm_head(checkpoint)
            return cls(checkpoint, body, None if head is None else head.to(device))
        except InputError as error:
            LOG.warning("pairs are judged by their texts, not by the pretrained LLM: %s", error)
            return None


def tuned_vectors(
    run: str, catalog: Catalog, table: ItemTable, pairs: Pairs, config: TuningConfig
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Fine-tune the LLM of a run on co-clicks [P, 2]; returns vectors [I, D] and facts.

    `table` has the run's own embeddings in the order of the catalogue. Pictures are not read.
    Raises InputError for a run that reads no texts, and on too few related pairs.
    """
    bundle = load_bundle(served(run).bundle, reads_requests=False)
    if not isinstance(bundle.interest, InterestModel):
        problem = f"needs a model that reads texts; {run} is a baseline over item ids"
        raise InputError("--aligned", "llm", problem, choices=["projection"])
    texts = _texts(bundle, catalog, table)
    random = np.random.default_rng(config.seed)
    asked = pairs[np.sort(random.permutation(len(pairs))[: config.most_pairs])]
    related, head, relevance = _related(run, bundle, catalog, texts, asked, config)
    tested, trained = held_out(related, config.held_out, random)
    model = _start(bundle.interest, texts, table.embeddings, head, config)
    own, before = table.embeddings, _encoded(model, texts)
    told = [generation_loss(model, texts, tested)]
    terms: list[tuple[float, float]] = []
    tune(model, texts, trained, config, lambda *both: terms.append(both))
    vectors = _encoded(model, texts)
    told.append(generation_loss(model, texts, tested))
    recall = [pair_recall(found, tested) for found in (own, vectors)]
    return vectors, {
        "relevance": relevance, "asked_pairs": len(asked), "related_pairs": len(related),
        "trained_on": len(trained), "held_out": len(tested),
        "start_cosine": round(_mean_cosine(own, before, bundle.interest.learned_width), 6),
        "terms": _summary(terms),
        "pair_recall_before": round(recall[0], 6), "pair_recall_after": round(recall[1], 6),
        "generation_before": round(told[0], 6), "generation_after": round(told[1], 6),
    }  # fmt: skip


def _checkpoint(run: str) -> str | None:
    """Return the pretrained LLM of text that a run's item encoder started from."""
    path = RunFolder(run).config
    model = read_json(path)["model"] if exists(path) else {}
    encoder = model.get("item_encoder", {})
    checkpoint = str(encoder.get("checkpoint", "tiny"))
    scratch = checkpoint == "tiny" or model.get("weights") == "random"
    return None if scratch or encoder.get("modality") == "multimodal" else checkpoint


def _texts(bundle: Bundle, catalog: Catalog, table: ItemTable) -> ItemTexts:
    assert isinstance(bundle.interest, InterestModel)
    limit = bundle.collate_config.max_item_tokens
    found = catalog_tokens(catalog, bundle.tokenizer, limit)
    fixed = table.embeddings[:, bundle.interest.learned_width :]
    return ItemTexts(*found, fixed, SpecialIds.of(bundle.tokenizer))


def _related(
    run: str, bundle: Bundle, catalog: Catalog, texts: ItemTexts, pairs: Pairs,
    config: TuningConfig,
) -> tuple[Pairs, Tensor | None, dict[str, Any]]:  # fmt: skip
    """Return the related pairs, the head of the pretrained LLM, and who said what is related."""
    llm = PretrainedLlm.of(run)
    if llm is None:
        related = relevant(pairs, text_similarity(catalog), config.relevance)
        return related, None, {"by": "texts", "least": config.relevance}
    judge = mutual_information(llm.body, llm.head, texts.tokens, texts.lengths, bundle.tokenizer)
    least = by_chance(judge, catalog.num_items, config.chance, config.seed)
    said = {"by": "llm", "llm": llm.checkpoint, "least": round(least, 6), "chance": config.chance}
    return relevant(pairs, judge, least), llm.head, said


def _start(
    interest: InterestModel, texts: ItemTexts, own: NDArray[np.float32], head: Tensor | None,
    config: TuningConfig,
) -> Summarizer:  # fmt: skip
    """Return the model before tuning, whose embeddings are those of the run or near them."""
    encoder, width = interest.item_encoder, interest.learned_width
    end = texts.special.end_of_text
    model = Summarizer(encoder, end, config.summary_tokens, head, config.seed)
    model = model.to(this_device()).eval()
    if encoder.config.pool == "mean" or encoder.config.modality == "multimodal":
        count = min(len(texts.lengths), FITTED_ON)
        rows = np.linspace(0, len(texts.lengths) - 1, count).astype(np.int64)
        states = _over_items(model, texts, rows, lambda tokens, sizes, _: model(tokens, sizes)[0])
        device = model.output.weight.device
        there = (torch.from_numpy(found).to(device) for found in (states, own[rows, :width]))
        model.fit(*there)
    return model


def _encoded(model: Summarizer, texts: ItemTexts) -> NDArray[np.float32]:
    """Return the embeddings [I, D] of all items."""
    return _over_items(
        model, texts, np.arange(len(texts.lengths)),
        lambda tokens, sizes, rows: embeddings(
            model, texts, rows.numpy(), model(tokens, sizes)[0]
        ),
    )  # fmt: skip


def _over_items(
    model: Summarizer, texts: ItemTexts, rows: NDArray[np.int64], encode: Callable[..., Tensor]
) -> NDArray[np.float32]:
    """Return what `encode` makes of items at some rows."""
    tokens, lengths = texts.tokens[rows], texts.lengths[rows]
    return encode_catalog(model, tokens, lengths, rows=rows, encode=encode, progress=True)


def _mean_cosine(own: NDArray[np.float32], found: NDArray[np.float32], width: int) -> float:
    """Return the mean cosine of the learned parts of two tables of vectors [I, D]."""
    first, second = (values[:, :width].astype(np.float64) for values in (own, found))
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(1) / np.maximum(lengths, 1e-12)).mean())


def _summary(terms: list[tuple[float, float]]) -> dict[str, list[float]]:
    """Return the means of both terms over the first and the last tenth of the steps."""
    values = np.asarray(terms, np.float64).reshape(-1, 2)
    tenth = max(1, len(values) // 10)
    ends = [part.mean(0) for part in (values[:tenth], values[-tenth:]) if len(part)]
    return {
        name: [round(float(end[column]), 6) for end in ends]
        for column, name in enumerate(("contrastive", "generation"))
    }
