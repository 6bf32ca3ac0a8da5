"""The item encoder E_phi, equation 2: an item's text, and optionally picture, -> one embedding.

Legend: U items, L tokens, D width of h and e.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from karma_ray.data.batch import host_of, upload
from karma_ray.data.catalog import Catalog
from karma_ray.data.pixels import NO_PICTURE, PixelTable, catalog_pixels
from karma_ray.data.prompts import Tokenizer
from karma_ray.errors import InputError
from karma_ray.model.adapters import Whitening, rms_normalize
from karma_ray.model.backbone import hidden_size, run_body, run_packed, token_embeddings
from karma_ray.model.backbones.family import BodyInput
from karma_ray.model.backbones.registry import pictures_of
from karma_ray.model.backbones.sentence_folder import SentenceFolder
from karma_ray.model.config import ItemEncoderConfig
from karma_ray.model.frozen_layers import freeze_lower, num_frozen, only_layers
from karma_ray.model.frozen_states import FrozenStates
from karma_ray.model.lexical import LexicalBlock, StateBlock
from karma_ray.ranges import check_ranges

LOG = logging.getLogger(__name__)
SAMPLED_AT_ONCE, SMALL = 2048, 256
"""Sampled items that a body of up to this width encodes at once; a wider one encodes fewer."""
SAME_STATES = 1e-10
"""Variance, relative to the mean square, below which pooled states differ by rounding only."""


def instruction_tokens(config: ItemEncoderConfig, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that are put before every item's text."""
    words = config.instruction
    return list(tokenizer([words], add_special_tokens=False)["input_ids"][0]) if words else []


@dataclass(frozen=True)
class LowerStates:
    """The states of items after the frozen layers, of their real tokens alone."""

    states: Tensor  # [N, d_item] float32, one item behind the other
    real: Tensor  # [U, S]
    last: Tensor  # [U] the last real slot

    def means(self) -> Tensor:
        """Return each item's mean [U, d_item]."""
        counts = host_of(self.last) + 1
        owner = upload(torch.repeat_interleave(torch.arange(len(counts)), counts), self.real.device)
        summed = self.states.new_zeros(len(counts), self.states.shape[1])
        return summed.index_add_(0, owner, self.states) / (self.last[:, None] + 1)


class ItemEncoder(nn.Module):
    """Backbone, pooling and W_e: e = RMSNorm(W_e (e_raw - mean)), method 1.2; see `whiten`.

    With `lexical` a fixed block is appended: counted words of the item, see LexicalBlock, or what
    the LLM says of it before training, see StateBlock. With `train_layers`
    the lower layers are frozen; where `states` holds their outputs, items are encoded from these.
    """

    instruction: Tensor
    mean: Tensor

    def __init__(
        self,
        body: nn.Module,
        config: ItemEncoderConfig,
        width: int,
        instruction: list[int],
        seed: int,
    ) -> None:
        super().__init__()
        check_ranges(config, "model.item_encoder")
        self.config, self.body = config, body
        self.pictures: PixelTable | None = None  # not part of the weights
        self.states: FrozenStates | None = None  # of the catalogue's items; not part of them either
        self.num_frozen = num_frozen(config, body)
        freeze_lower(body, self.num_frozen)
        if config.modality == "multimodal":
            block = pictures_of(body).block(body)
            if config.image_size < block or config.image_size % block:
                message = f"is not a multiple of {block}"
                raise InputError("model.item_encoder.image_size", config.image_size, message)
        generator = torch.Generator().manual_seed(seed)
        raw = hidden_size(body)
        self.output = nn.Linear(raw, width, bias=False)
        nn.init.orthogonal_(self.output.weight, generator=generator)
        self.register_buffer("mean", torch.zeros(raw))
        if config.pool == "emb_token":
            self.item_token = nn.Parameter(0.02 * torch.randn(raw, generator=generator))
        self.register_buffer("instruction", torch.tensor(instruction, dtype=torch.long))
        size = config.lexical
        of_states = {"words": 0, "both": size // 2, "states": size}[config.block]
        part = width / 2 if config.block == "both" else width  # both together have one length
        if of_words := size - of_states:
            self.words = LexicalBlock(len(token_embeddings(body)), of_words, part)
        if of_states:
            self.known = StateBlock(raw, of_states, part)

    def attach_catalog(self, catalog: Catalog, data_uri: str) -> None:
        """Load the pictures of a data folder's items; a text encoder needs none."""
        if self.config.modality == "multimodal":
            self.pictures = catalog_pixels(catalog, data_uri, self.config.image_size)

    def forward(self, tokens: Tensor, lengths: Tensor, rows: Tensor | None = None) -> Tensor:
        """Encode right-padded tokens [U, L] with an end of text, lengths [U], as e [U, D].

        `rows` [U] are catalogue rows, whose pictures a multimodal encoder reads; for a query they
        must be NO_PICTURE (-1).
        """
        return self.embed(self.features(tokens, lengths, rows))

    def features(self, tokens: Tensor, lengths: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return what e is made of: the pooled states and the fixed block [U, d_item + K]."""
        lower = self._lower(tokens, lengths, rows)
        parts = [self._pooled(tokens, lengths, rows, lower)]
        if hasattr(self, "words"):
            parts.append(self.words(tokens, lengths))
        if lower is not None and hasattr(self, "known"):
            parts.append(self.known(lower.means()))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def embed(self, features: Tensor) -> Tensor:
        """Return e [U, D] of `features` [U, d_item + K]."""
        raw = len(self.mean)
        learned = rms_normalize(self.output(features[:, :raw] - self.mean))
        return torch.cat([learned, features[:, raw:]], 1) if self.config.lexical else learned

    @torch.no_grad()
    def whiten(
        self, tokens: Tensor, lengths: Tensor, rows: Tensor | None = None, *, ridge: float = 0.01
    ) -> None:
        """Fit the mean and W_e on a sample of items, so that e uses all its dimensions.

        Pooled states of a language model share one large common direction (cosine 0.9 and more
        between any two texts) and vary little otherwise. Without whitening, decoders and dot
        products see nearly equal items and training starts collapsed. Whitening (BERT-flow,
        2011.05864; 2103.15316) makes W_e a rotation of the whitened states; `ridge`, a share of
        the largest variance, keeps rounding noise from being amplified. A sample of equal texts (a
        single item, or texts that are cut before they differ) has no variance, so nothing is
        fitted.
        """
        states = [
            self.pooled(tokens[c], lengths[c], None if rows is None else rows[c])
            for c in self._chunks(len(tokens))
        ]
        self.whiten_states(torch.cat(states), ridge)

    @torch.no_grad()
    def whiten_states(self, states: Tensor, ridge: float = 0.01) -> None:
        """As `whiten`, for the pooled states [U, d_item] of a sample."""
        found = Whitening.of(states, ridge)
        if found.variances.max() <= SAME_STATES * states.double().square().mean():
            LOG.warning(
                "all of %d sampled items have the same text, so the model cannot distinguish them: "
                "use different texts, or read more of each (collate.max_item_tokens)", len(states),
            )  # fmt: skip
            return
        self.mean.copy_(found.mean)
        rotation = self.output.weight.double()
        self.output.weight.copy_(rotation @ (found.axes * found.scales) @ found.axes.T)

    def pooled(self, tokens: Tensor, lengths: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the pooled states e_raw [U, d_item]."""
        return self._pooled(tokens, lengths, rows, self._lower(tokens, lengths, rows))

    @torch.no_grad()
    def fit_known(self, tokens: Tensor, lengths: Tensor, rows: Tensor) -> None:
        """Fit the block of frozen states to a sample of items, given as to `whiten`."""
        means = []
        for some in self._chunks(len(tokens)):
            lower = self._lower(tokens[some], lengths[some], rows[some])
            assert lower is not None
            means.append(lower.means())
        self.known.fit(torch.cat(means))

    def _chunks(self, count: int) -> list[slice]:
        """Divide a sample into portions that fit into memory."""
        size = SAMPLED_AT_ONCE // max(1, hidden_size(self.body) // SMALL)
        return [slice(start, start + size) for start in range(0, count, size)]

    def _pooled(
        self, tokens: Tensor, lengths: Tensor, rows: Tensor | None, lower: LowerStates | None
    ) -> Tensor:
        if lower is not None:
            with only_layers(self.body, self.num_frozen):
                states = run_packed(self.body, lower.states, lower.real)
            return self._pool(states, lower.real, lower.last)
        prefix = self.instruction.expand(len(tokens), -1)
        embeddings = token_embeddings(self.body)[torch.cat([prefix, tokens], 1)]
        last = upload(host_of(lengths) + prefix.shape[1] - 1, tokens.device)
        order = torch.arange(len(tokens), device=tokens.device)
        if self.config.pool == "emb_token":
            at_last = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=tokens.device)
            at_last[order, last] = True
            embeddings = torch.where(at_last[..., None], self.item_token, embeddings)
        if self.config.modality == "multimodal":
            seen = self._seen(embeddings, last, prefix.shape[1], rows)
        else:
            seen = BodyInput(embeddings, None, last, ())
        embeddings, last = seen.embeddings, seen.last
        real = _slots_upto(last, embeddings.shape[1])
        states = run_body(
            self.body, embeddings, positions=seen.positions, real=real, deep=seen.deep
        )
        return self._pool(states, real, last)

    @torch.no_grad()
    def lower_states(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return the states [N, d_item] after the frozen layers, of the real tokens of all items.

        Takes tokens [U, L] and lengths [U], as `forward`; the instruction's tokens come first.
        """
        prefix = self.instruction.expand(len(tokens), -1)
        embeddings = token_embeddings(self.body)[torch.cat([prefix, tokens], 1)]
        slots = torch.arange(embeddings.shape[1], device=tokens.device)
        real = slots < lengths[:, None] + prefix.shape[1]
        with only_layers(self.body, 0, self.num_frozen):
            return run_body(self.body, embeddings, real=real)[real]

    def _lower(self, tokens: Tensor, lengths: Tensor, rows: Tensor | None) -> LowerStates | None:
        """Return the states after the frozen layers, kept or computed; None where the body is run
        in one go."""
        kept = self.states is not None and rows is not None and bool((host_of(rows) >= 0).all())
        if not kept and not hasattr(self, "known"):
            return None
        ends = host_of(lengths) + len(self.instruction)
        last = upload(ends - 1, lengths.device)
        if kept and self.states is not None and rows is not None:
            found = upload(self.states.gather(host_of(rows).numpy(), ends.numpy()), last.device)
        else:
            found = self.lower_states(tokens, lengths)
        return LowerStates(found.float(), _slots_upto(last, int(ends.max())), last)

    def _pool(self, states: Tensor, real: Tensor, last: Tensor) -> Tensor:
        """Return the pooled states [U, d_item] of states [U, S, d_item]."""
        if self.config.pool == "mean":
            return (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return states[torch.arange(len(last), device=last.device), last]

    def _seen(
        self, embeddings: Tensor, last: Tensor, num_prefix: int, rows: Tensor | None
    ) -> BodyInput:
        """Return the input with the pictures of the items at `rows` inserted."""
        if rows is None:
            raise ValueError("a multimodal item encoder needs catalogue rows beside the tokens")
        if bool((host_of(rows) == NO_PICTURE).all()):
            return BodyInput(embeddings, None, last, ())
        if self.pictures is None:
            raise ValueError("a multimodal item encoder needs pictures: call attach_catalog first")
        pictured, pixels = self.pictures.gather(host_of(rows).numpy())
        device = embeddings.device
        return pictures_of(self.body).insert(
            self.body, embeddings, last, num_prefix, torch.from_numpy(pictured).to(device),
            torch.from_numpy(pixels).to(device), learns=self.config.vision == "full",
        )  # fmt: skip


@torch.no_grad()
def start_from(encoder: ItemEncoder, folder: SentenceFolder) -> bool:
    """Let an encoder compute what a folder of sentence-transformers does; False if it has no W_e.

    Nothing is taken over by an encoder that pools otherwise or lacks upper layers.
    Raises InputError when the vectors have another width than the user decoder.
    """
    if encoder.config.pool != folder.pool or encoder.config.layers:
        return False
    if folder.pool == "emb_token":
        encoder.item_token.copy_(token_embeddings(encoder.body)[folder.end])
    projection = folder.projection()
    if projection is None:
        return False
    mean, weight = projection
    if weight.shape != encoder.output.weight.shape:
        raise InputError(
            "model.item_encoder.checkpoint", folder.root,
            f"makes vectors of {len(weight)} dimensions, but the user decoder has the width "
            f"{encoder.output.out_features}: take the decoder of that size, or leave out the Dense",
        )  # fmt: skip
    encoder.mean.copy_(mean)
    encoder.output.weight.copy_(weight)
    return True


def _slots_upto(last: Tensor, num_slots: int) -> Tensor:
    """Return the mask [U, S] of slots up to the last ones [U], planned on the host."""
    return upload(torch.arange(num_slots) <= host_of(last)[:, None], last.device)
