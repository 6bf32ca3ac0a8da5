"""The complete KARMA model: the model that serves, and the decoders that exist only in training.

`KarmaModel` *has* an `InterestModel`; export saves `model.interest` and removes nothing.

Legend: B windows, M decoded positions, R rows to decode, U items, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from karma_ray.data.batch import Batch, host_of, upload
from karma_ray.data.draws import TOKENS, uniform
from karma_ray.data.prompts import SpecialIds, Tokenizer
from karma_ray.model.backbone import token_embeddings
from karma_ray.model.config import DecodabilityConfig
from karma_ray.model.decodability import (
    Decodability,
    TextTargets,
    history_to_text,
    run_branches,
    shuffled_text,
    text_branch,
    text_targets,
    vector_to_text,
)
from karma_ray.model.imagery import Imagery, ImageTargets
from karma_ray.model.interest import InterestModel

DECODE_PROMPT = "item:"


@dataclass(frozen=True)
class Decoded:
    """One decoding task's states at its text targets."""

    states: Tensor  # [R, L + 1, D]
    targets: TextTargets
    head: Tensor  # [V, D]


class KarmaModel(nn.Module):
    """Interest model, Task 1, Task 2 and the visual term.

    Each task is computed by a method of its own. With weight 0 the method is not called, and no
    private decoder (`decodes=False`) and no `imagery` is built.
    """

    def __init__(
        self, interest: InterestModel, tokenizer: Tokenizer, *, lm_head: Tensor | None = None,
        decodes: bool = True, imagery: Imagery | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.interest = interest
        self.imagery = imagery
        self.special = SpecialIds.of(tokenizer)
        self.tokenizer = tokenizer
        config = interest.config.decodability
        if lm_head is not None:
            learns = interest.config.peft == "full"  # the head belongs to the backbone
            self.lm_head = nn.Parameter(lm_head, learns)
        prompt = tokenizer([DECODE_PROMPT], add_special_tokens=False)["input_ids"][0]
        if not decodes:  # no private decoder; probes use the shared one
            config = DecodabilityConfig(
                max_target_tokens=config.max_target_tokens,
                task1_see_readout=config.task1_see_readout,
            )
        user = interest.user_decoder
        self.decodability = Decodability(config, user.body, user.projector, prompt)
        if lm_head is not None and hasattr(self.decodability, "body"):
            # An untied head belongs to its decoder: a private decoder gets a copy of it.
            trained = learns and config.recon_decoder != "frozen"
            self.decodability.lm_head = nn.Parameter(lm_head.detach().clone(), trained)

    def head_of(self, body: nn.Module) -> Tensor:
        """Return the output embeddings [V, D] of a decoder: its own input rows when tied."""
        if body is getattr(self.decodability, "body", None) and hasattr(self, "lm_head"):
            return cast(Tensor, self.decodability.lm_head)
        return self.lm_head if hasattr(self, "lm_head") else token_embeddings(body)

    def forward_with_text(self, batch: Batch, items: Tensor) -> tuple[Tensor, Decoded]:
        """Return h [B, T, D] and Task 1's states, in one pass of the decoder body."""
        user = self.interest.user_decoder
        prefix = self.interest.prefix(batch, items)
        targets = self.targets(batch)
        states, text = history_to_text(
            user.body, prefix, batch, targets,
            see_readout=self.decodability.config.task1_see_readout,
        )  # fmt: skip
        return user.interest(states, prefix), Decoded(text, targets, self.head_of(user.body))

    def forward_with_images(
        self, batch: Batch, items: Tensor, *, text: bool
    ) -> tuple[Tensor, Decoded | None, Tensor]:
        """As `forward_with_text`, with `text` optional; also returns Task 1's L_img per row [R]."""
        assert self.imagery is not None
        user, images = self.interest.user_decoder, ImageTargets.of(batch)
        prefix, targets = self.interest.prefix(batch, items), self.targets(batch)
        words = text_branch(user.body, targets)
        branch = self.imagery.branch(images.mask, words)
        with_text = text or branch.after is not None
        states, found = run_branches(
            user.body, prefix, batch, [words, branch] if with_text else [branch],
            see_readout=self.decodability.config.task1_see_readout,
        )  # fmt: skip
        decoded = Decoded(found[0], targets, self.head_of(user.body)) if text else None
        losses = self.imagery.losses(found[-1], images)
        return user.interest(states, prefix), decoded, losses

    def image_losses(self, vectors: Tensor, images: ImageTargets) -> Tensor:
        """Return L_img per row [R] from P(x) alone; x [R, D] is h_t (Task 2) or e_i (warm-up)."""
        assert self.imagery is not None
        body = self.decodability.decoder(self.interest.user_decoder.body)
        projected = self.decodability.project(self.interest.user_decoder.projector, vectors)
        states = self.imagery.vector_states(body, projected, images.mask)
        return self.imagery.losses(states, images)

    def interest_image_losses(self, batch: Batch, interest: Tensor) -> Tensor:
        """Return Task 2's L_img [R] from h_t alone; interest [R, D]."""
        if self.decodability.config.recon_detach_h:
            interest = interest.detach()
        return self.image_losses(interest, ImageTargets.of(batch))

    def decode_interest(self, batch: Batch, interest: Tensor, *, dropout: bool = True) -> Decoded:
        """Task 2, equation 7: decode the target's text from h_t alone; interest [R, D].

        Measurements use `dropout=False`: no token dropout and the target's own text, so that they
        are comparable between runs.
        """
        config = self.decodability.config
        if config.recon_detach_h:
            interest = interest.detach()
        targets = self.targets(batch)
        if dropout and config.recon_text == "shuffled":
            items, key = host_of(batch.item_rows)[_decoded_items(batch)], host_of(batch.row_key)[0]
            targets = shuffled_text(targets, items, int(key))
        inputs = self._drop_tokens(targets, batch) if dropout else targets.inputs
        return self._decode(interest, inputs, targets, *self._query(batch, batch.decode_step))

    def decode_items(self, tokens: Tensor, lengths: Tensor, items: Tensor) -> Decoded:
        """Warm-up: decode an item's text from its own embedding; items [R, D]."""
        targets = text_targets(
            tokens, lengths, self.special, self.decodability.config.max_target_tokens
        )
        return self._decode(items, targets.inputs, targets, None, None)

    def targets(self, batch: Batch) -> TextTargets:
        """Return the texts at the decoded positions, R = B M rows; masked where none is decoded."""
        chosen, device = _decoded_items(batch), batch.decode_mask.device
        item, lengths = upload(chosen, device), upload(host_of(batch.item_lengths)[chosen], device)
        targets = text_targets(
            batch.item_tokens[item], lengths, self.special,
            self.decodability.config.max_target_tokens,
        )  # fmt: skip
        mask = host_of(targets.mask) & host_of(batch.decode_mask).flatten()[:, None]
        return replace(targets, mask=upload(mask, device))

    @torch.no_grad()
    def speak(
        self, interest: Tensor, requests: Batch | None = None, max_tokens: int = 24
    ) -> list[str]:
        """Decode h [R, D] greedily: what the embedding says that the user wants.

        Under `recon_cond=fig1` the decoder also reads the queries of `requests`, R windows.
        """
        seen: tuple[Tensor | None, Tensor | None] = (None, None)
        if requests is not None:
            requests = requests.to(interest.device)
            seen = self._query(requests, requests.step_mask.sum(1, keepdim=True) - 1)
        body = self.decodability.decoder(self.interest.user_decoder.body)
        projected = self.decodability.project(self.interest.user_decoder.projector, interest)
        inputs = torch.full((len(interest), 1), self.special.text_start, device=interest.device)
        for _ in range(max_tokens):
            states = vector_to_text(
                body, self.decodability.prompt, projected, inputs,
                torch.ones_like(inputs, dtype=torch.bool), *seen,
            )[:, -1]  # fmt: skip
            following = (states.float() @ self.head_of(body).float().T).argmax(-1, keepdim=True)
            inputs = torch.cat([inputs, following], 1)
        return [self._words(row) for row in inputs[:, 1:].tolist()]

    def _query(self, batch: Batch, steps: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return query tokens [R, Lq] and their mask at steps [B, M], if Task 2 may read them."""
        if self.decodability.config.recon_cond != "fig1":
            return None, None
        index = host_of(batch.query_index).gather(1, host_of(steps)).flatten()
        tokens = batch.query_tokens[upload(index, batch.query_tokens.device)]
        real = torch.arange(tokens.shape[1]) < host_of(batch.query_lengths)[index][:, None]
        return tokens, upload(real, tokens.device)

    def _decode(
        self, vectors: Tensor, inputs: Tensor, targets: TextTargets,
        condition: Tensor | None, condition_mask: Tensor | None,
    ) -> Decoded:  # fmt: skip
        body = self.decodability.decoder(self.interest.user_decoder.body)
        projected = self.decodability.project(self.interest.user_decoder.projector, vectors)
        states = vector_to_text(
            body, self.decodability.prompt, projected, inputs, targets.mask, condition,
            condition_mask,
        )  # fmt: skip
        return Decoded(states, targets, self.head_of(body))

    def _drop_tokens(self, targets: TextTargets, batch: Batch) -> Tensor:
        """Mask input tokens, drawn from the row's key to be independent of workers and parts."""
        share = self.decodability.config.recon_token_dropout
        if share == 0.0:
            return targets.inputs
        keys = host_of(batch.row_key).numpy()[:, None, None]
        steps = host_of(batch.decode_step).numpy()[:, :, None]
        places = np.arange(targets.inputs.shape[1])
        numbers = torch.from_numpy(uniform(keys, TOKENS, steps, places))
        drawn = upload(numbers.view(targets.inputs.shape), targets.inputs.device)
        dropped = (drawn < share) & (targets.inputs != self.special.text_start)
        return targets.inputs.masked_fill(dropped, self.special.end_of_text)

    def _words(self, ids: list[int]) -> str:
        stop = {self.special.text_end, self.special.end_of_text}
        kept: list[int] = []
        for token in ids:
            if token in stop:
                break
            kept.append(token)
        return self.tokenizer.decode(kept, skip_special_tokens=True).strip()


def _decoded_items(batch: Batch) -> Tensor:
    """Return the items [R] at the decoded positions, on the host."""
    return host_of(batch.item_index).gather(1, host_of(batch.decode_step)).flatten()
