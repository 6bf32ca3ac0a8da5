"""OCARM: what the teacher reads and the student does not, and what distillation trains."""

from __future__ import annotations

from dataclasses import replace

import torch

from karma_ray.ranking.batch import CtrBatch
from karma_ray.ranking.config import RankingConfig
from karma_ray.ranking.items import ItemEmbedding
from karma_ray.ranking.objective import log_loss
from karma_ray.ranking.ocarm import (
    HierarchicalAttention,
    Ocarm,
    OcarmTeacher,
    Pooling,
    not_shown,
    ocarm_terms,
)

CONFIG = RankingConfig(
    family="ocarm", width=4, hidden=32, attention_hidden=4, query_buckets=16, distillation=1.0
)


def student() -> Ocarm:
    torch.manual_seed(0)
    return Ocarm(CONFIG, ItemEmbedding(30, [5, 4], CONFIG.width))


def teacher() -> OcarmTeacher:
    torch.manual_seed(2)
    return OcarmTeacher(CONFIG, ItemEmbedding(30, [5, 4], CONFIG.width))


def batch(num_items: int = 20) -> CtrBatch:
    """Three pages of four candidates; the third has no later clicks."""
    draw = torch.Generator().manual_seed(0)
    later = torch.randint(num_items, 30, (3, 5), generator=draw)
    later[0, :2], later[2] = -1, -1
    sessions = torch.tensor([[-1, -1, 3, 3, 4], [1, 1, 1, 2, 2], [-1] * 5])
    return CtrBatch(
        history=torch.randint(0, 30, (3, 5), generator=draw),
        query=torch.randint(1, 16, (3, 2), generator=draw),
        request=torch.arange(3).repeat_interleave(4),
        candidate=torch.randint(0, num_items, (12,), generator=draw),
        features=torch.zeros(12, 0),
        clicked=(torch.rand(12, generator=draw) > 0.5).float(),
        extra={"later": later, "later_session": sessions},
    )


def logits(model: Ocarm | OcarmTeacher, given: CtrBatch) -> torch.Tensor:
    found: torch.Tensor = model(*given.named(model.inputs))
    return found


def with_later(given: CtrBatch, later: torch.Tensor) -> CtrBatch:
    return replace(given, extra={**given.extra, "later": later})


def test_what_comes_after_the_page_changes_the_teacher_and_not_the_student() -> None:
    given = batch()
    changed = with_later(given, given.extra["later"].flip(0))
    changed = replace(changed, clicked=1 - given.clicked)
    assert torch.equal(logits(student(), given), logits(student(), changed))  # bit for bit
    assert not torch.equal(logits(teacher(), given), logits(teacher(), changed))


def test_a_later_click_on_an_item_of_the_page_tells_the_teacher_nothing() -> None:
    given = batch()
    later = given.extra["later"].clone()
    later[1, 0] = -1
    returned = later.clone()
    returned[1, 0] = given.candidate[5]  # shown on page 1
    other = later.clone()
    other[1, 0] = given.candidate[0]  # shown on page 0 alone
    assert given.candidate[0] not in given.candidate[4:8]
    model = teacher()
    without = logits(model, with_later(given, later))
    assert torch.equal(logits(model, with_later(given, returned)), without)
    assert not torch.equal(logits(model, with_later(given, other)), without)


def test_unknown_candidates_hide_no_later_click() -> None:
    later = torch.tensor([[29, -1], [3, 29]])
    request, candidate = torch.tensor([0, 1, 1]), torch.tensor([4, -1, 3])
    assert not_shown(later, request, candidate).tolist() == [[True, False], [False, True]]


def test_later_sessions_are_read_in_two_levels() -> None:
    """A plain loop: attention over the items of each session, then over the sessions."""
    torch.manual_seed(0)
    model = HierarchicalAttention(4)
    items, session = torch.randn(1, 5, 4), torch.tensor([[-1, 3, 3, 7, 7]])
    there = torch.tensor([[False, True, True, False, True]])

    def pooled(pooling: Pooling, values: torch.Tensor) -> torch.Tensor:
        scores = pooling.weight(torch.tanh(pooling.hidden(values)))
        return (torch.softmax(scores, 0) * values).sum(0)

    sessions = [pooled(model.over_items, items[0, places]) for places in ([1, 2], [4])]
    wanted = pooled(model.over_sessions, torch.stack(sessions))
    torch.testing.assert_close(model(items, session, there)[0], wanted)


def test_a_user_without_later_clicks_has_no_later_vector() -> None:
    given = batch()
    found = teacher().user.later(
        torch.randn(3, 5, 4), given.extra["later_session"], given.extra["later"] >= 0
    )
    assert torch.equal(found[2], torch.zeros(4))
    assert found[:2].any(1).all()


def test_distillation_trains_the_student_and_leaves_the_teacher() -> None:
    model, taught_by, given = student(), teacher(), batch()
    _, distillation = ocarm_terms(CONFIG, taught_by)
    values = distillation.values(model, given, logits(model, given))
    assert values.shape == (3,)
    values.sum().backward()
    assert all(p.grad is not None for p in model.user.parameters())
    assert all(p.grad is None for p in [*taught_by.parameters(), *model.din.head.parameters()])


def test_distillation_is_zero_for_a_student_that_has_learned_it() -> None:
    model, taught_by, given = student(), teacher(), batch()
    _, distillation = ocarm_terms(CONFIG, taught_by)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(150):
        loss = distillation.values(model, given, given.clicked).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 < losses[0]


def test_the_gradient_of_clicks_reaches_all_of_both_models() -> None:
    for model in (student(), teacher()):
        model.items.attributes[1:] = 1
        given = batch()
        log_loss(model, given, logits(model, given)).sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_page_does_not_depend_on_the_others() -> None:
    given = batch()
    alone = CtrBatch(
        given.history[1:2], given.query[1:2], torch.zeros(4, dtype=torch.long),
        given.candidate[4:8], given.features[4:8], given.clicked[4:8],
        {name: values[1:2] for name, values in given.extra.items()},
    )  # fmt: skip
    for model in (student(), teacher()):
        torch.testing.assert_close(logits(model, alone), logits(model, given)[4:8])


def test_a_traced_student_gives_the_same_logits() -> None:
    model, given = student().eval(), batch()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(*given.named(model.inputs)), logits(model, given))
