"""OCARM (2604.25839): a teacher reads what exists only after the page, and a student learns to.

    teacher: t = encoder(past, query, later), trained first with the loss of clicks, then frozen
    student: s = encoder(past, query);  L = BCE + distillation x (1 - cos(s, stop_gradient(t)))

The later clicks are read by attention in two levels, over the items of a session and then over
sessions. Items that the page shows are left out of them: whether the user came back to one of
them would tell the teacher what was clicked. The student's `forward` takes no later clicks, so
that nothing of them can reach what it answers.

Legend: R pages, N candidates, T history, L later clicks, Q query terms, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from karma_ray.ranking.batch import CtrBatch
from karma_ray.ranking.din import INPUTS, Din
from karma_ray.ranking.objective import CLICKS, Term

if TYPE_CHECKING:
    from karma_ray.ranking.config import RankingConfig

UNSEEN = -1e4
"""The score of what is not seen, far below any other, in every precision."""
PAST = ("history", "query")
"""What the student's user encoder reads."""
LATER = {"later": "later_rows", "later_session": "later_sessions"}
"""What a teacher reads besides: further tensors [R, L] of a batch, and their columns."""


class Pooling(nn.Module):
    """Attention with a learned query: softmax over w . tanh(W x) (hierarchical, as in HAN)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.weight = nn.Linear(width, 1, bias=False)

    def forward(self, values: Tensor, seen: Tensor) -> Tensor:
        """Pool what each row sees; 0 for a row that sees nothing.

        [R, L, D], [R, S, L] bool -> [R, S, D]
        """
        scores = self.weight(torch.tanh(self.hidden(values))).transpose(1, 2)  # [R, 1, L]
        weights = torch.softmax(scores.masked_fill(~seen, UNSEEN), -1)
        return torch.bmm(weights * seen.to(weights.dtype), values)


class HierarchicalAttention(nn.Module):
    """Pools the items of each session, and then the sessions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.over_items = Pooling(width)
        self.over_sessions = Pooling(width)

    def forward(self, items: Tensor, session: Tensor, there: Tensor) -> Tensor:
        """Return one vector per page; the items of a session stand beside each other.

        [R, L, D], [R, L], [R, L] bool -> [R, D]
        """
        together = session.unsqueeze(2) == session.unsqueeze(1)
        sessions = self.over_items(items, together & there.unsqueeze(1))  # at each of its items
        earlier = torch.tril(together & there.unsqueeze(1), diagonal=-1).any(2)
        first = there & ~earlier  # every session counts once
        pooled: Tensor = self.over_sessions(sessions, first.unsqueeze(1)).squeeze(1)
        return pooled


class UserEncoder(nn.Module):
    """What is known of a user: the past and the query, and for a teacher the later clicks."""

    def __init__(self, width: int, with_later: bool) -> None:
        super().__init__()
        self.past = Pooling(width)
        if with_later:
            self.later = HierarchicalAttention(width)
        parts = 4 if with_later else 3
        # Without biases: those of all users are the same, and two vectors that are mostly what all
        # users have in common have a cosine near 1 before anything is learnt.
        self.fuse = nn.Sequential(
            nn.Linear(parts * width, 2 * width, bias=False), nn.Tanh(),
            nn.Linear(2 * width, width, bias=False),
        )  # fmt: skip

    def forward(self, keys: Tensor, seen: Tensor, words: Tensor, *later: Tensor) -> Tensor:
        """Encode users; `later` are the arguments of HierarchicalAttention.

        [R, T, D], [R, T] bool, [R, D], ... -> [R, D]
        """
        mean = keys.sum(1) / seen.sum(1, keepdim=True).clamp(min=1)
        parts = [mean, self.past(keys, seen.unsqueeze(1)).squeeze(1), words]
        if later:
            parts.append(self.later(*later))
        user: Tensor = self.fuse(torch.cat(parts, -1))
        return user


class Ocarm(nn.Module):
    """The student: a DIN that is also given the user's vector and its product with the item."""

    inputs = INPUTS

    def __init__(self, config: RankingConfig, items: nn.Module) -> None:
        super().__init__()
        self.din = Din(config, items, nn.Identity(), 2 * config.width)
        self.user = UserEncoder(config.width, with_later=False)

    @property
    def items(self) -> nn.Module:
        """The embeddings of the items, which `know` the catalogue."""
        return self.din.items

    def forward(
        self, history: Tensor, query: Tensor, request: Tensor, candidate: Tensor, features: Tensor
    ) -> Tensor:
        """Return logits.  # [R, T], [R, Q], [N], [N], [N, 0] -> [N]"""
        user = self.vectors(history, query)
        return matched(self.din, user, history, query, request, candidate)

    def vectors(self, history: Tensor, query: Tensor) -> Tensor:
        """Return the users' vectors s.  # [R, T], [R, Q] -> [R, D]"""
        user: Tensor = self.user(self.din.items(history), history >= 0, self.din.query(query))
        return user


class OcarmTeacher(nn.Module):
    """The same model with the later clicks in the user's vector; it cannot serve."""

    inputs = (*INPUTS, *LATER)

    def __init__(self, config: RankingConfig, items: nn.Module) -> None:
        super().__init__()
        self.din = Din(config, items, nn.Identity(), 2 * config.width)
        self.user = UserEncoder(config.width, with_later=True)

    @property
    def items(self) -> nn.Module:
        """The embeddings of the items, which `know` the catalogue."""
        return self.din.items

    def forward(
        self, history: Tensor, query: Tensor, request: Tensor, candidate: Tensor,
        features: Tensor, later: Tensor, later_session: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return logits.  # [R, T], [R, Q], [N], [N], [N, 0], [R, L], [R, L] -> [N]"""
        user = self.vectors(history, query, request, candidate, later, later_session)
        return matched(self.din, user, history, query, request, candidate)

    def vectors(
        self, history: Tensor, query: Tensor, request: Tensor, candidate: Tensor,
        later: Tensor, later_session: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return the users' vectors t.

        [R, T], [R, Q], [N], [N], [R, L], [R, L] -> [R, D]
        """
        items, query = self.din.items, self.din.query(query)
        there = not_shown(later, request, candidate)
        user: Tensor = self.user(
            items(history), history >= 0, query, items(later), later_session, there
        )
        return user


def matched(
    din: Din, user: Tensor, history: Tensor, query: Tensor, request: Tensor, candidate: Tensor
) -> Tensor:
    """Return the logits of a DIN whose features are users' vectors.

    [R, D], [R, T], [R, Q], [N], [N] -> [N]
    """
    own = user.index_select(0, request)
    features = torch.cat([own, own * din.items(candidate)], -1)
    logits: Tensor = din(history, query, request, candidate, features)
    return logits


def not_shown(later: Tensor, request: Tensor, candidate: Tensor) -> Tensor:
    """Whether a later click is one, of an item that its page does not show.

    [R, L], [N], [N] -> [R, L] bool
    """
    stride = torch.cat([later.flatten(), candidate]).max() + 2  # rows start at -1
    page = torch.arange(len(later), device=later.device).unsqueeze(1)
    shown = torch.isin(page * stride + later + 1, request * stride + candidate + 1)
    return (later >= 0) & ~shown


@dataclass(frozen=True)
class Distillation:
    """1 - cos(s, t) of every page; the teacher is frozen."""

    teacher: OcarmTeacher

    def __call__(self, model: nn.Module, batch: CtrBatch, logits: Tensor) -> Tensor:  # -> [R]
        """Return how far the student's vectors turn away from the teacher's."""
        assert isinstance(model, Ocarm)
        student: Tensor = model.vectors(*batch.named(PAST))
        self.teacher.to(student.device)
        with torch.no_grad():
            target = self.teacher.vectors(*batch.named((*PAST, "request", "candidate", *LATER)))
        return 1.0 - torch.cosine_similarity(student, target, dim=-1)


def ocarm_terms(config: RankingConfig, teacher: nn.Module | None) -> list[Term]:
    """Return the terms of a student's objective, and freeze its teacher if it has one."""
    if not isinstance(teacher, OcarmTeacher):
        return [CLICKS]
    teacher.requires_grad_(False).eval()
    return [CLICKS, Term("distillation", config.distillation, Distillation(teacher))]
