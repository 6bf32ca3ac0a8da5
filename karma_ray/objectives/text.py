"""Token cross-entropy of equations 6 and 7, in chunks, with logits at text targets only.

Legend: R rows, L tokens, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from karma_ray.data.batch import host_of, upload

CHUNK = 2048


def token_cross_entropy(
    states: Tensor, head: Tensor, labels: Tensor, mask: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Return cross-entropy [R, L] of labels [R, L] for states [R, L, D] and head [V, D].

    Logits are computed for `chunk` targets at a time, and again in the backward pass. Values
    outside the mask are 0.
    """
    index = upload(host_of(mask).flatten().nonzero().squeeze(1), mask.device)
    picked, wanted = states.flatten(0, 1).index_select(0, index), labels.flatten()[index]
    parts = []
    # Without targets the result keeps a zero gradient, so that all workers run the backward.
    for begin in range(0, len(wanted), chunk) or (0,):
        piece = slice(begin, begin + chunk)
        if len(wanted) <= chunk:
            parts.append(_chunk(picked[piece], head, wanted[piece]))
        else:
            parts.append(
                cast(
                    Tensor,
                    checkpoint(_chunk, picked[piece], head, wanted[piece], use_reentrant=False),
                )
            )
    result = torch.zeros(mask.numel(), dtype=torch.float32, device=mask.device)
    return result.index_copy(0, index, torch.cat(parts)).view(mask.shape)


def reduce_tokens(values: Tensor, mask: Tensor, reduction: str) -> Tensor:
    """[R, L] -> [R]: `token_mean` over an example's tokens, or `sum` as in the paper."""
    total = (values * mask).sum(1)
    return total / mask.sum(1).clamp(min=1) if reduction == "token_mean" else total


def _chunk(states: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return cast(Tensor, _CrossEntropy.apply(states, head.to(states.dtype), labels))  # type: ignore[no-untyped-call]


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(states head^T)[label], which computes the probabilities for its gradient.

    Logits are products in the compute type, sums are float32 (or float64). The backward pass
    keeps probabilities [N, V] in the compute type, instead of float32 logits and their
    log-softmax.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        logits = (states @ head.T).to(torch.promote_types(states.dtype, torch.float32))
        places = labels[:, None]
        top = logits.amax(1, keepdim=True)
        own = logits.gather(1, places)
        weights = logits.sub_(top).exp_()
        total = weights.sum(1, keepdim=True)
        ctx.save_for_backward(states, head, places, weights.div_(total).to(states.dtype))
        return (total.log() + top - own)[:, 0].float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        states, head, places, shares = ctx.saved_tensors
        gradient = gradients[0][:, None].to(shares.dtype)
        of_logits = (shares * gradient).scatter_add_(1, places, -gradient)
        of_states = of_logits @ head if ctx.needs_input_grad[0] else None
        return of_states, of_logits.T @ states if ctx.needs_input_grad[1] else None, None
