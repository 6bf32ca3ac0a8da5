"""Collapse probes of a set of embeddings (METHOD 1.13, "other collapse probes").

Legend: n vectors of d dimensions. Values are Python floats; nothing here carries a gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FEWEST_OF_A_LABEL = 10
"""Rarer labels are left out of the probe: they would be learnt and tested on a handful."""
TRAINED_SHARE = 0.7


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


def spread(items: Tensor, interest: Tensor) -> dict[str, float]:  # e [U, d], h [n, d]
    """Effective rank and mean cosine of e and of h, as a report names them.

    Callers give the learned dimensions: those that hold counted words cannot collapse.
    """
    return {
        f"collapse/{name}_{side}": probe(vectors)
        for name, probe in (("effective_rank", effective_rank), ("mean_cosine", mean_cosine))
        for side, vectors in (("e", items), ("h", interest))
    }


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


@dataclass(frozen=True)
class LabelProbe:
    """How well a linear classifier reads a label off vectors it was not fitted on."""

    accuracy: float  # percent of the held-out vectors
    majority: float  # percent, by always answering the commonest label: the floor
    num_labels: int
    num_tested: int


def label_probe(
    vectors: Tensor,  # [n, d]
    labels: Sequence[str | None],  # [n]
    groups: Sequence[int],  # [n]
    seed: int,
) -> LabelProbe | None:
    """Logistic regression on standardised vectors, fitted on 70 % of the groups.

    `groups` are equal for vectors that must not stand on both sides (items of equal text); the
    split is drawn from `seed` and does not depend on the vectors. None where fewer than two labels
    are common enough.
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
    with warnings.catch_warnings():  # collapsed vectors converge late, and to little
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
    """Percent of the variance of `words` that a ridge regression reads off held-out vectors.

    It is fitted anew on 70 % of the groups, so it reads what the vectors hold, whatever decoder
    they were or were not trained with; about 0 where they hold none of the words. `groups` must not
    stand on both sides (users). None with fewer than two groups, or words that do not vary.
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
    """Mask [n] of the vectors that a probe is fitted on: those of TRAINED_SHARE of the groups."""
    drawn = np.random.default_rng(seed).permutation(np.unique(np.asarray(groups)))
    return np.isin(np.asarray(groups), drawn[: round(TRAINED_SHARE * len(drawn))])


def _standardised(vectors: Tensor, fitted: np.ndarray) -> np.ndarray:
    """[n, d] by mean and deviation of the fitted rows."""
    values = _full_precision(vectors).double().cpu().numpy()
    mean, spread = values[fitted].mean(0), values[fitted].std(0)
    result: np.ndarray = (values - mean) / np.where(spread > 1e-9, spread, 1.0)
    return result


def _full_precision(vectors: Tensor) -> Tensor:
    detached = vectors.detach()
    return detached if detached.dtype == torch.float64 else detached.float()
