"""Collapse metrics of a set of embeddings (method 1.13, "other collapse probes").

Legend: n vectors of d dimensions. Values are Python floats; no function carries a gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FEWEST_OF_A_LABEL = 10
"""Smallest number of examples of a label; rarer labels are left out of the probe."""
TRAINED_SHARE = 0.7


def effective_rank(vectors: Tensor) -> float:  # [n, d] -> scalar
    """Return exp(H(p)), where p are the singular values normalised to sum 1; not centred.

    The identity of size n gives n, constant rows give 1, and a zero or empty matrix gives 0.
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
    """Return the mean cosine over the n (n - 1) ordered pairs of different rows.

    It uses |sum of unit vectors|^2 = n + the sum over pairs, so it needs no n x n memory. A zero
    row has cosine 0 with every row; fewer than two rows give 0.
    """
    count = len(vectors)
    if count < 2:
        return 0.0
    unit = torch.nn.functional.normalize(_full_precision(vectors), dim=1).double()
    own = unit.square().sum()
    return float((unit.sum(dim=0).square().sum() - own) / (count * (count - 1)))


def spread(items: Tensor, interest: Tensor) -> dict[str, float]:  # e [U, d], h [n, d]
    """Return effective rank and mean cosine of e and of h, by their names in reports.

    Callers pass the learned dimensions only, because the lexical block cannot collapse.
    """
    return {
        f"collapse/{name}_{side}": probe(vectors)
        for name, probe in (("effective_rank", effective_rank), ("mean_cosine", mean_cosine))
        for side, vectors in (("e", items), ("h", interest))
    }


def linear_cka(left: Tensor, right: Tensor) -> float:  # [n, d1], [n, d2] -> scalar
    """Return |Yc^T Xc|_F^2 / (|Xc^T Xc|_F |Yc^T Yc|_F), columns centred (Kornblith et al. 2019).

    It is 1 for rotations and uniform scalings of each other, and 0 when one side is constant.
    """
    assert len(left) == len(right), "linear_cka compares the same items under two encoders"
    x, y = (_full_precision(side).double() for side in (left, right))
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    scale = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    if scale <= 0:
        return 0.0
    return float(torch.linalg.matrix_norm(y.T @ x).square() / scale)


@dataclass(frozen=True)
class LabelProbe:
    """Accuracy of a linear classifier that predicts a label from held-out vectors."""

    accuracy: float  # percent of the held-out vectors
    majority: float  # percent, by always predicting the most frequent label: the floor
    num_labels: int
    num_tested: int


def label_probe(
    vectors: Tensor,  # [n, d]
    labels: Sequence[str | None],  # [n]
    groups: Sequence[int],  # [n]
    seed: int,
) -> LabelProbe | None:
    """Fit a logistic regression on standardised vectors of 70 % of the groups, and test it.

    `groups` are equal for vectors that must be on the same side of the split (items with equal
    texts). The split is drawn from `seed` and does not depend on the vectors. None if fewer than
    two labels are frequent enough.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    names = np.array([label or "" for label in labels])
    values, counts = np.unique(names, return_counts=True)
    common = values[(counts >= FEWEST_OF_A_LABEL) & (values != "")]
    known = np.isin(names, common)
    fitted = _fitted_side(groups, seed)
    train, test = known & fitted, known & ~fitted
    if len(np.unique(names[train])) < 2 or not test.any():
        return None
    values = _standardised(vectors, train)
    with warnings.catch_warnings():  # collapsed vectors converge slowly, which is no problem here
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(max_iter=500).fit(values[train], names[train])
    found, numbers = np.unique(names[train], return_counts=True)
    return LabelProbe(
        accuracy=100.0 * float((model.predict(values[test]) == names[test]).mean()),
        majority=100.0 * float((names[test] == found[numbers.argmax()]).mean()),
        num_labels=len(common),
        num_tested=int(test.sum()),
    )


def words_probe(
    vectors: Tensor,  # [n, d]
    words: np.ndarray,  # [n, V] 0 or 1
    groups: Sequence[str],  # [n]
    seed: int,
) -> float | None:
    """Return the percent of the variance of `words` that ridge regression predicts from vectors.

    It is fitted on 70 % of the groups and tested on the others. It measures what the vectors
    contain, whatever decoder they were trained with; about 0 means that they contain none of the
    words. `groups` (users) are on one side of the split each. None with fewer than two groups, or
    if the words do not vary.
    """
    from sklearn.linear_model import RidgeCV

    fitted = _fitted_side(groups, seed)
    train, test = words[fitted].astype(np.float64), words[~fitted].astype(np.float64)
    if not len(train) or not len(test):
        return None
    spread = ((test - train.mean(0)) ** 2).sum()
    if spread == 0:
        return None
    values = _standardised(vectors, fitted)
    model = RidgeCV(alphas=np.logspace(0, 5, 11)).fit(values[fitted], train)
    return 100.0 * float(1.0 - ((test - model.predict(values[~fitted])) ** 2).sum() / spread)


def _fitted_side(groups: Sequence[int] | Sequence[str], seed: int) -> np.ndarray:
    """Return the mask [n] of vectors for fitting: those of TRAINED_SHARE of the groups."""
    drawn = np.random.default_rng(seed).permutation(np.unique(np.asarray(groups)))
    return np.isin(np.asarray(groups), drawn[: round(TRAINED_SHARE * len(drawn))])


def _standardised(vectors: Tensor, fitted: np.ndarray) -> np.ndarray:
    """Standardise [n, d] by mean and deviation of the fitted rows."""
    values = _full_precision(vectors).double().cpu().numpy()
    mean, spread = values[fitted].mean(0), values[fitted].std(0)
    result: np.ndarray = (values - mean) / np.where(spread > 1e-9, spread, 1.0)
    return result


def _full_precision(vectors: Tensor) -> Tensor:
    detached = vectors.detach()
    return detached if detached.dtype == torch.float64 else detached.float()
