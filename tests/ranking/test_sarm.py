"""SARM: what anchors add to an item, the bank that serves, and the table of anchors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from karma_ray.artifacts import join, read_table, remove, write_table
from karma_ray.data.catalog import Catalog
from karma_ray.data.prompts import SpecialIds, Tokenizer
from karma_ray.errors import InputError, SkewError
from karma_ray.model.backbone import token_embeddings
from karma_ray.model.interest import InterestModel
from karma_ray.ranking import anchors
from karma_ray.ranking.anchors import Anchors, ensure_anchors, load_anchors
from karma_ray.ranking.batch import CtrBatch
from karma_ray.ranking.config import RankingConfig
from karma_ray.ranking.din import Din
from karma_ray.ranking.items import ItemEmbedding, ItemFacts
from karma_ray.ranking.objective import log_loss
from karma_ray.ranking.sarm import AnchoredItems, VectorItems, gate_values, with_bank
from karma_ray.retrieval.parts import served
from karma_ray.retrieval.retriever import Retriever
from tests import tiny_run

CONFIG = RankingConfig(family="sarm", width=4, hidden=8, attention_hidden=4, query_buckets=16)
NUM_ITEMS = 30


def facts() -> ItemFacts:
    """Item 7 has no anchors."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 12, (NUM_ITEMS, 5))
    tokens[:, 3:] *= draw.integers(0, 2, (NUM_ITEMS, 1))
    tokens[7] = 0
    return ItemFacts(
        attributes=draw.integers(1, 5, (NUM_ITEMS, 2)),
        vectors=draw.normal(size=(NUM_ITEMS, 6)).astype(np.float32),
        anchors=Anchors(*np.unique(tokens, axis=0, return_inverse=True), [""] * NUM_ITEMS),
    )


def anchored() -> AnchoredItems:
    torch.manual_seed(0)
    items = AnchoredItems(
        ItemEmbedding(NUM_ITEMS, [5, 5], CONFIG.width),
        NUM_ITEMS,
        len(np.unique(facts().anchors.tokens, axis=0)),
        12,
        5,
    )
    items.know(facts())
    return items


def ranker(items: nn.Module) -> Din:
    torch.manual_seed(1)
    return Din(CONFIG, items, nn.Identity(), 0)


def batch(seed: int = 0) -> CtrBatch:
    """Three pages of four candidates, one of them unknown."""
    draw = torch.Generator().manual_seed(seed)
    history = torch.randint(0, NUM_ITEMS, (3, 5), generator=draw)
    history[0, :2], history[1] = -1, -1
    candidate = torch.randint(0, NUM_ITEMS, (12,), generator=draw)
    candidate[2] = -1
    return CtrBatch(
        history=history,
        query=torch.randint(1, 16, (3, 2), generator=draw),
        request=torch.arange(3).repeat_interleave(4),
        candidate=candidate,
        features=torch.zeros(12, 0),
        clicked=(torch.rand(12, generator=draw) > 0.5).float(),
    )


def logits(model: nn.Module, given: CtrBatch) -> torch.Tensor:
    found: torch.Tensor = model(*given.named(model.inputs))  # type: ignore[arg-type]
    return found


def test_the_bank_gives_the_same_logits_and_holds_no_text_encoder() -> None:
    model, given = ranker(anchored()).eval(), batch()
    bank = with_bank(model)
    torch.testing.assert_close(logits(bank, given), logits(model, given))
    assert not [name for name in bank.state_dict() if "encoder" in name or "token" in name]
    own = {name for name in model.state_dict() if not name.startswith("items.")}
    assert set(bank.state_dict()) == {*own, "items.table"}
    assert isinstance(model.items, AnchoredItems)  # goes on being trained


def test_serving_with_the_bank_costs_no_more_operations_than_ids_alone() -> None:
    """Operations that multiply: the bank adds none to a model over ids."""
    counts = []
    for model in (
        ranker(ItemEmbedding(NUM_ITEMS, [], CONFIG.width)),
        with_bank(ranker(anchored())),
    ):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            logits(model.eval(), batch())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_an_item_is_encoded_alike_in_every_batch() -> None:
    items = anchored().eval()
    alone, among = items(torch.tensor([[3]]))[0, 0], items(torch.tensor([9, 3, 3, -1, 12]))
    torch.testing.assert_close(among[1], alone)
    assert torch.equal(among[1], among[2]) and torch.equal(among[3], torch.zeros(4))


def test_padding_of_anchors_changes_nothing() -> None:
    encoder = anchored().encoder.eval()
    tokens = torch.tensor([[3, 5, 2, 0, 0]])
    torch.testing.assert_close(encoder(tokens[:, :3]), encoder(tokens))


def test_an_item_without_anchors_keeps_its_own_embedding() -> None:
    items, row = anchored().eval(), torch.tensor([7])
    assert torch.equal(items(row), items.base(row))
    assert not torch.equal(items(row + 1), items.base(row + 1))


def test_gates_are_measured_over_the_items_with_anchors() -> None:
    items = anchored()
    with torch.no_grad():
        items.gate.weight.zero_()
        items.gate.bias.copy_(torch.tensor([0.0, 100.0]))
    found = gate_values(items)
    assert found["gate/1/mean"] == 0.5 and found["gate/2/mean"] == 1.0
    assert found["gate/1/std"] == found["gate/2/std"] == 0.0


def test_the_loss_of_clicks_trains_the_text_encoder() -> None:
    given = batch()
    for items in (anchored(), vectors()):
        model = ranker(items)
        log_loss(model, given, logits(model, given)).sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def vectors() -> VectorItems:
    torch.manual_seed(0)
    items = VectorItems(ItemEmbedding(NUM_ITEMS, [5, 5], CONFIG.width), NUM_ITEMS, 6)
    items.know(facts())
    return items


def test_the_control_adds_a_projection_of_the_frozen_vector() -> None:
    items, row = vectors(), torch.tensor([4, -1])
    wanted = items.base(row[:1]) + torch.from_numpy(facts().vectors[4:5]) @ items.project.weight.T
    torch.testing.assert_close(items(row[:1]), wanted)
    assert torch.equal(items(row[1:]), torch.zeros(1, 4))


def test_tokens_are_numbered_by_those_that_occur() -> None:
    words = tiny_run.tokenizer()
    found = Anchors.of(["red mug", "", "mug red mug"], words, max_tokens=2)
    first, again = words(["red mug", "mug red"], add_special_tokens=False)["input_ids"]
    assert found.sizes == (3, len({*first, *again[:2]}), 2)
    tokens = found.tokens[found.place]
    assert tokens[1].tolist() == [0, 0] and (tokens[0] > 0).all()
    assert tokens[2].tolist() == tokens[0][::-1].tolist()


@pytest.fixture
def run(tmp_path: Path) -> str:
    return tiny_run.write_run(tmp_path, interest=talkative(tiny_run.tokenizer()))


def talkative(words: Tokenizer) -> InterestModel:
    """An untrained model that does not end its text at once."""
    model, special = tiny_run.interest_model(words), SpecialIds.of(words)
    rows = token_embeddings(model.user_decoder.body)
    with torch.no_grad():
        rows[[special.end_of_text, special.text_end]] = 0
        rows[special.text_start] *= 0.1
    return model


def test_decoded_anchors_are_what_the_model_says_of_each_vector(run: str, tmp_path: Path) -> None:
    data, cache = tiny_run.write_data(tmp_path), str(tmp_path / "cache")
    folder = ensure_anchors(run, data, "decoded", 6, cache)
    found = load_anchors(folder, run, data)
    table = Retriever.load(run, data).table
    model = anchors.decoder_of(run)
    assert len(set(found.texts)) > 1
    assert found.texts == model.speak(torch.from_numpy(table.embeddings), max_tokens=6)
    own = load_anchors(ensure_anchors(run, data, "words", 6, cache), run, data)
    assert own.texts == Catalog.load(data).texts()
    assert own.tokens.shape[1] <= 6


def test_an_interrupted_table_goes_on_where_it_was(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchors, "PART_ITEMS", 16)
    data, cache = tiny_run.write_data(tmp_path), str(tmp_path / "cache")
    folder = ensure_anchors(run, data, "decoded", 4, cache)
    whole = read_table(folder, ["item_id", "text"])
    first = pa.table({"item_id": whole["item_id"][:16], "text": ["kept"] * 16})
    write_table(first, folder, "part-000000000000")
    for name in ("part-000000000032.parquet", "manifest.json"):
        remove(join(folder, name))
    assert ensure_anchors(run, data, "decoded", 4, cache) == folder
    again = load_anchors(folder, run, data)
    assert again.texts == ["kept"] * 16 + whole["text"].to_pylist()[16:]


def test_anchors_of_another_run_or_catalogue_are_refused(run: str, tmp_path: Path) -> None:
    data, cache = tiny_run.write_data(tmp_path), str(tmp_path / "cache")
    folder = ensure_anchors(run, data, "words", 6, cache)
    (tmp_path / "other").mkdir()
    other = tiny_run.write_run(tmp_path / "other", seed=5)
    with pytest.raises(SkewError, match="made with bundle"):
        load_anchors(folder, other, data)
    assert ensure_anchors(other, data, "words", 6, cache) != folder
    elsewhere = str(tmp_path / "elsewhere")
    write_table(tiny_run.items_table().slice(0, 30), join(elsewhere, "items"))
    with pytest.raises(SkewError, match="made with items"):
        load_anchors(folder, run, elsewhere)
    with pytest.raises(InputError, match=r"ranking\.anchors: 'titles'"):
        ensure_anchors(run, data, "titles", 6, cache)


def test_a_run_whose_output_head_is_not_in_its_bundle_decodes_nothing(run: str) -> None:
    config = Path(served(run).bundle) / "user_decoder" / "config.json"
    text = config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    config.write_text(text)
    with pytest.raises(InputError, match="an output head of its own"):
        anchors.decoder_of(run)


def test_a_model_with_anchors_is_still_traced_when_it_serves() -> None:
    model = with_bank(ranker(anchored()))
    traced, given = torch.fx.symbolic_trace(model), batch(1)
    torch.testing.assert_close(traced(*given.named(Din.inputs)), logits(model, given))
