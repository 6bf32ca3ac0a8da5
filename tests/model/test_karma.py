"""What is train-only stays outside the model that serves; what is not asked for is not built."""

from __future__ import annotations

import pytest
import torch

from karma_ray.data.prompts import encode_texts
from karma_ray.model.backbone import token_embeddings
from karma_ray.model.karma import KarmaModel
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.step import JointStep
from karma_ray.training.warmup_step import TokenBatch, WarmupStep
from tests import tiny


def _head(seed: int = 0) -> torch.Tensor:
    size = len(tiny.tokenizer().get_vocab())  # type: ignore[attr-defined]
    return torch.randn(size, 32, generator=torch.Generator().manual_seed(seed))


def _step_gradients(karma: KarmaModel) -> dict[str, torch.Tensor]:
    return tiny.gradients(karma, JointStep(ObjectiveConfig())(karma, tiny.batch()).loss)


def test_what_serves_holds_no_head_and_no_decoder() -> None:
    karma = tiny.model(recon_decoder="separate", share_projector=False, lm_head=_head())
    names = set(karma.interest.state_dict())
    assert names and not [n for n in names if "lm_head" in n or "decodability" in n]
    outside = set(karma.state_dict()) - {f"interest.{name}" for name in names}
    assert {"lm_head"} < {name.split(".")[0] for name in outside} <= {"lm_head", "decodability"}


@pytest.mark.parametrize("recon_decoder", ["separate", "frozen", "light:1"])
def test_a_decoder_nobody_asks_for_is_not_in_memory(recon_decoder: str) -> None:
    plain = tiny.num_parameters(tiny.model())
    private = {"recon_decoder": recon_decoder, "share_projector": False}
    assert tiny.num_parameters(tiny.model(decodes=False, **private)) == plain
    assert tiny.num_parameters(tiny.model(**private)) > plain


def test_task_1_keeps_its_switch_when_task_2_is_not_built() -> None:
    batch = tiny.batch()
    objective = ObjectiveConfig(reconstruction=0.0)
    losses = [
        JointStep(objective)(tiny.model(task1_see_readout=see, decodes=built), batch).loss.item()
        for see in (True, False)
        for built in (True, False)
    ]
    assert losses[0] == losses[1] != losses[2] == losses[3]


def test_a_tied_head_is_the_decoders_own_input_rows() -> None:
    karma = tiny.model(recon_decoder="separate")
    for body in (karma.interest.user_decoder.body, karma.decodability.body):
        assert karma.head_of(body) is token_embeddings(body)
    assert not hasattr(karma, "lm_head")


def test_an_untied_head_speaks_for_the_shared_decoder() -> None:
    head = _head()
    karma = tiny.model(lm_head=head)
    assert torch.equal(karma.head_of(karma.interest.user_decoder.body), head)
    assert _step_gradients(karma)["lm_head"].any()


@pytest.mark.parametrize(("recon_decoder", "trained"), [("separate", True), ("frozen", False)])
def test_a_private_decoder_has_its_own_copy_of_an_untied_head(
    recon_decoder: str, trained: bool
) -> None:
    karma = tiny.model(lm_head=_head(), recon_decoder=recon_decoder)
    own = karma.head_of(karma.decodability.body)
    assert torch.equal(own, karma.lm_head) and own is not karma.lm_head
    moved = {name for name, g in _step_gradients(karma).items() if g.any()}
    assert "lm_head" in moved  # by Task 1
    assert any(name.startswith("decodability") for name in moved) == trained


def test_a_warmed_up_model_says_an_items_text_from_its_embedding() -> None:
    texts = ["red shirt", "a blue mug", "lamp", "green garden chair"]
    tokens, lengths = (
        torch.from_numpy(array).long() for array in encode_texts(tiny.tokenizer(), texts, 10)
    )
    karma, batch, step = tiny.model(), TokenBatch(tokens, lengths), WarmupStep()
    assert abs(step.gap(karma, batch)) < 0.5
    tiny.train(karma, lambda: step(karma, batch).loss, steps=100, learning_rate=5e-3)
    assert step.gap(karma, batch) > 1
    with torch.no_grad():
        items = karma.interest.encode_items(tokens, lengths)
    assert karma.speak(items, max_tokens=10) == texts


@pytest.mark.parametrize("recon_cond", ["eq7", "fig1"])
def test_only_fig1_speaks_with_the_query_in_sight(recon_cond: str) -> None:
    karma = tiny.model(recon_cond=recon_cond)
    h = 5.0 * torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    past = ["i0", "i1"]
    words = [
        karma.speak(h, tiny.collator().requests(tiny.examples(*[tiny.request(past, query)] * 6)))
        for query in ("mug", "lamp")
    ]
    assert (words[0] == words[1]) == (recon_cond == "eq7")
    assert (words[0] == karma.speak(h)) == (recon_cond == "eq7")
