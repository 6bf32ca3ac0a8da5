"""Collapse probes of a set of embeddings (METHOD 1.13, "other collapse probes").

Legend: n vectors of d dimensions. Values are Python floats; nothing here carries a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(vectors: Tensor) -> float:  # [n, d] -> scalar
    """exp(H(p)), p the singular values normalised to sum 1; not centred.

    The identity of size n gives n, constant rows give 1, and a zero or empty matrix 0.
    """
    if vectors.numel() == 0:
        return 0.0
    values = torch.linalg.svdvals(_full_precision(vectors))
    total = values.sum()
    if total <= 0:
        return 0.0
    shares = values / total
    return float(torch.exp(torch.special.entr(shares).sum()))


def mean_cosine(vectors: Tensor) -> float:  # [n, d] -> scalar
    """Mean cosine over the n (n - 1) ordered pairs of different rows; 0 below two rows.

    By |sum of unit vectors|^2 = n + the sum over pairs, so never n x n memory. A zero row has
    cosine 0 with every row.
    """
    count = len(vectors)
    if count < 2:
        return 0.0
    unit = torch.nn.functional.normalize(_full_precision(vectors), dim=1).double()
    own = unit.square().sum()
    return float((unit.sum(dim=0).square().sum() - own) / (count * (count - 1)))


def linear_cka(left: Tensor, right: Tensor) -> float:  # [n, d1], [n, d2] -> scalar
    """|Yc^T Xc|_F^2 / (|Xc^T Xc|_F |Yc^T Yc|_F), columns centred (Kornblith et al. 2019).

    1 for a rotation or uniform scaling of one another, 0 when one of them is constant.
    """
    assert len(left) == len(right), "linear_cka compares the same items under two encoders"
    x, y = (_full_precision(side).double() for side in (left, right))
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    scale = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    if scale <= 0:
        return 0.0
    return float(torch.linalg.matrix_norm(y.T @ x).square() / scale)


def _full_precision(vectors: Tensor) -> Tensor:
    detached = vectors.detach()
    return detached if detached.dtype == torch.float64 else detached.float()
