"""Attention sinks: columns that get much attention whatever they hold (method 1.13, 2410.10781).

Position 1 is a sink in ordinary pretrained language models, so it cannot distinguish a healthy
model from a collapsed one. Sinks and stripes on *content* columns (words of the item itself) can.

Legend: B samples, H heads, T positions; `weights` [..., T, T] are rows of attention that sum to 1,
`visible` [..., T, T] is the attention mask: row attends to column, lower triangular by default.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 0.3
"""A column is a sink if its average attention over rows exceeds this share (2410.10781)."""
STRIPE_SHARE = 0.05
"""Share of the content columns that count for the stripe mass, the heaviest ones."""
MEASURES = ("sink_first", "content_sink", "stripe_mass", "row_entropy", "profile_entropy")


def column_means(weights: Tensor, visible: Tensor | None = None) -> Tensor:
    """Return alpha [..., T] of weights [..., T, T]: the mean over rows that attend to column k.

    alpha_k = 1 / (T - k + 1) sum_{i >= k} A_ik for a causal map; 0 for a fully masked column.
    """
    seen = _visible(weights, visible)
    return (weights * seen).sum(-2) / seen.sum(-2).clamp(min=1)


def row_entropies(weights: Tensor, visible: Tensor | None = None) -> Tensor:
    """Return H(A_i) / ln(positions visible to row i), [..., T, T] -> [..., T].

    It is 1 for even attention and 0 for attention to one column; NaN below two visible positions.
    """
    seen = _visible(weights, visible)
    entropy: Tensor = torch.special.entr(weights * seen).sum(-1)
    choices = seen.sum(-1)
    bound = torch.where(choices > 1, choices, torch.nan).log()
    return entropy / bound


def content_columns(template: Tensor, num_prompt: int = 0) -> Tensor:
    """Return the mask [B, T] of columns that may count as content sinks, from `template` [B, T].

    Excluded are the first column, `template` (separators, special tokens, padding), and k > T / 2:
    late columns average one or two rows, so that a head that attends to the previous token would
    count as a sink. A prompt at the beginning is not counted in k and T.
    """
    place = torch.arange(1, template.shape[-1] + 1, device=template.device)
    behind = place - num_prompt
    early = (behind > 0) & (behind <= (template.shape[-1] - num_prompt) / 2)
    return ~template & (place > 1) & early


def sink_measures(
    weights: Tensor,  # [B, H, T, T]
    content: Tensor,  # [B, T]
    visible: Tensor | None = None,  # [B, T, T]; empty rows for padding
    epsilon: float = EPSILON,
) -> dict[str, Tensor]:
    """Return MEASURES of every sample and head [B, H]; the diagnosis averages them (method 1.13).

    * `sink_first`: 100 if alpha_1 > epsilon, else 0
    * `content_sink`: 100 if any content column has alpha_k > epsilon, else 0
    * `stripe_mass`: percent of all attention on the heaviest 5 % (at least one) content columns
    * `row_entropy`: mean of `row_entropies` over rows with several visible positions
    * `profile_entropy`: entropy in nats of the mean row; low if all rows attend to the same columns

    `content_sink` and `stripe_mass` are NaN in a sample without a content column.
    """
    weights = weights.float()
    seen = _visible(weights, None if visible is None else visible[:, None])
    rows = seen.any(-1).sum(-1).clamp(min=1)[..., None]  # [B, 1, 1]
    alpha = column_means(weights, seen)  # [B, H, T]
    profile = (weights * seen).sum(-2) / rows  # [B, H, T]
    inside = content[:, None]
    none = ~inside.any(-1)
    most = alpha.masked_fill(~inside, -1.0).amax(-1)
    return {
        "sink_first": 100.0 * (alpha[..., 0] > epsilon),
        "content_sink": (100.0 * (most > epsilon)).masked_fill(none, torch.nan),
        "stripe_mass": (100.0 * _heaviest(profile, content)).masked_fill(none, torch.nan),
        "row_entropy": row_entropies(weights, seen).nanmean(-1),
        "profile_entropy": torch.special.entr(profile).sum(-1),
    }


def _heaviest(profile: Tensor, content: Tensor) -> Tensor:
    """Return the mass [B, H] of the heaviest content columns of profiles [B, H, T]."""
    ordered = profile.masked_fill(~content[:, None], 0.0).sort(-1, descending=True).values
    counts = [max(1, math.ceil(STRIPE_SHARE * number)) for number in content.sum(-1).tolist()]
    taken = torch.tensor(counts, device=profile.device)
    place = torch.arange(profile.shape[-1], device=profile.device)
    return (ordered * (place < taken[:, None])[:, None]).sum(-1)


def _visible(weights: Tensor, visible: Tensor | None) -> Tensor:
    if visible is not None:
        return visible
    size = weights.shape[-1]
    return torch.ones(size, size, dtype=torch.bool, device=weights.device).tril()
