"""What each segment sees, and that generated text learns of an item through its summary alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from karma_ray.codes.segments import three_segments

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 0], [1, 2, 3, 3, 3, 3, 0, 0]])


def test_every_segment_sees_what_it_may() -> None:
    rows = three_segments(SEGMENTS)[0].int().tolist()
    assert rows == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]


def attend(states: torch.Tensor, summary_is_cut: bool) -> torch.Tensor:
    """Three layers of attention; the summary's states may be cut from the graph in each."""
    mask, is_summary = three_segments(SEGMENTS), (SEGMENTS == 2)[..., None]
    for _ in range(3):
        if summary_is_cut:
            states = torch.where(is_summary, states.detach(), states)
        states = states + scaled_dot_product_attention(states, states, states, attn_mask=mask)
    return states


@pytest.mark.parametrize("summary_is_cut", [False, True])
def test_text_reaches_generated_tokens_through_the_summary_alone(summary_is_cut: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 8, 4, generator=generator, requires_grad=True)
    attend(states, summary_is_cut)[SEGMENTS == 3].sum().backward()
    assert states.grad is not None
    leaked = states.grad[SEGMENTS == 1].abs()
    assert bool((leaked == 0).all()) if summary_is_cut else bool((leaked > 0).all())


def test_the_summary_does_not_see_what_is_generated() -> None:
    states = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    changed = torch.where((SEGMENTS == 3)[..., None], states + 1, states)
    before, after = attend(states, False), attend(changed, False)
    assert torch.equal(before[SEGMENTS != 3], after[SEGMENTS != 3])
    assert not torch.equal(before[SEGMENTS == 3], after[SEGMENTS == 3])
