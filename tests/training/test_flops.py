"""Counted operations are those of the formulas: against the masks, and against torch's counter."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from karma_ray.data.batch import Batch
from karma_ray.model import decodability, item_encoder, user_decoder
from karma_ray.model.backbone import build_tiny, run_body
from karma_ray.model.config import (
    DecodabilityConfig,
    ItemEncoderConfig,
    ModelConfig,
    TinyBackboneConfig,
    UserDecoderConfig,
)
from karma_ray.model.frozen_states import FrozenStates, write_states
from karma_ray.model.interest import InterestModel
from karma_ray.model.item_encoder import ItemEncoder
from karma_ray.model.karma import KarmaModel
from karma_ray.model.lora import adapt, set_trained
from karma_ray.model.packing import worth_packing
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.runs.frozen_outputs import FrozenPortions
from karma_ray.training import flops
from karma_ray.training.flops import BodyCost, Work, joint_flops, peak_flops, tabled_peak
from karma_ray.training.item_table import share_items
from karma_ray.training.step import JointStep
from karma_ray.training.step_state import StepState
from tests import tiny

WIDE = TinyBackboneConfig(
    hidden_size=64, num_layers=2, num_heads=4, num_key_value_heads=2, intermediate_size=160
)
Pass = tuple[nn.Module, int, int, int, int]
"""Body, real tokens, visible pairs, and tokens and pairs that were computed beyond them."""


def requests_and_clicks() -> Batch:
    """Windows whose last step has no item yet in one, and empty queries."""
    rows = tiny.sequences(
        tiny.window(["i1", "i2", "i3", "i9"], hours=[0, 0, 1, 1], queries=["mug", "mug", "", None]),
        tiny.window(["i4"], user="v"),
        tiny.window(["i5", "i6"], queries=["a red chair for the garden", "lamp"], user="w"),
    )
    return tiny.batch(rows)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """What every body was run over."""
    seen: list[Pass] = []

    def watched(
        body: nn.Module, embeddings: Tensor, visible: Tensor | None = None,
        positions: Tensor | None = None, real: Tensor | None = None, deep: tuple[Tensor, ...] = (),
    ) -> Tensor:  # fmt: skip
        rows, slots = embeddings.shape[:2]
        if real is None:
            real = torch.ones(rows, slots, dtype=torch.bool)
        if visible is None:
            sees = torch.ones(slots, slots, dtype=torch.bool).tril()[None]
        else:
            sees = visible
        tokens = int(real.sum())
        pairs = int((sees & real[:, :, None] & real[:, None, :]).sum())
        padding = 0 if worth_packing(real) else rows * slots - tokens
        # On a CPU attention runs on the padded grid.
        seen.append((body, tokens, pairs, padding, rows * slots * slots - pairs))
        return run_body(body, embeddings, visible, positions, real, deep)

    for module in (decodability, item_encoder, user_decoder):
        monkeypatch.setattr(module, "run_body", watched)
    return seen


@pytest.mark.parametrize("make", [tiny.batch, requests_and_clicks])
@pytest.mark.parametrize(("layout", "query_mode"), tiny.VARIANTS)
@pytest.mark.parametrize("more", [{}, {"recon_cond": "fig1", "task1_see_readout": False}])
def test_tokens_and_pairs_are_those_of_the_masks(
    passes: list[Pass], make: Any, layout: str, query_mode: str, more: dict[str, Any]
) -> None:
    karma, batch = tiny.model(layout, query_mode, instruction="an item:", **more), make()
    work = Work.of(karma, batch)
    items = karma.interest.encode_items(batch.item_tokens, batch.item_lengths)
    karma.interest.interest(batch, items)
    h, _ = karma.forward_with_text(batch, items)
    rows = batch.decode_step.numel()
    karma.decode_interest(batch, torch.randn(rows, tiny.BODY.hidden_size))
    assert h.shape[:2] == batch.step_mask.shape

    counts = [(tokens, pairs) for _, tokens, pairs, *_ in passes]
    assert (work.item_tokens, work.item_pairs) == counts.pop(0)
    if query_mode == "encoder":  # of each pass: two; empty queries are run, but nobody asked
        first, second = counts.pop(0), counts.pop(1)
        assert first == second
        empty = int((batch.query_lengths == 0).sum())
        length = len(karma.interest.item_encoder.instruction) + 1
        assert work.query_tokens + empty * length == first[0]
        assert work.query_pairs + empty * length * (length + 1) // 2 == first[1]
    assert (work.tokens, work.pairs) == counts[0]
    assert (work.tokens + work.text_tokens, work.pairs + work.text_pairs) == counts[1]
    assert (work.rows_tokens, work.rows_pairs) == counts[2]
    assert work.targets == int(karma.targets(batch).mask.sum())
    assert work.pool == len(share_items(batch).pool)


@pytest.mark.parametrize("rank", [None, 4])
def test_a_pass_over_a_body_costs_what_the_counter_says(rank: int | None) -> None:
    body = build_tiny(WIDE, 300, 0)
    if rank is not None:
        adapt(body, rank, 0)
    soft = torch.randn(3, 7, WIDE.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        states = run_body(body, soft)
    cost = BodyCost.of(body)
    # Older versions of transformers compute the rotary angles as a matrix product, which counts.
    angles = 2 * 3 * 7 * (WIDE.hidden_size // WIDE.num_heads // 2)
    assert counter.get_total_flops() - cost.forward(3 * 7, 3 * 7 * 7) in (0, angles)
    with FlopCounterMode(display=False) as counter:
        states.sum().backward()
    learns: Any = "all" if rank is None else "adapters"
    both = cost.step(3 * 7, 3 * 7 * 7, learns)
    assert counter.get_total_flops() == both - cost.forward(3 * 7, 3 * 7 * 7)


CASES: list[dict[str, Any]] = [
    {},
    {"generation": 0.0},
    {"reconstruction": 0.0, "generation": 0.0},
    {"encoder": "frozen"},
    {"encoder": "bank"},
    {"rank": 4},
    {"recon_decoder": "frozen"},
    {"lexical": 200},
    {"lexical": 200, "layout": "query_last", "query_mode": "encoder"},
    {"layout": "query_last", "query_mode": "encoder", "recon_cond": "fig1"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_joint_step_costs_what_the_counter_says(passes: list[Pass], case: dict[str, Any]) -> None:
    karma, batch, encoder = _wide(case), tiny.batch(), case.get("encoder", "full")
    objective = ObjectiveConfig(
        generation=case.get("generation", 1.0), reconstruction=case.get("reconstruction", 1.0)
    )
    if encoder != "full":
        set_trained(karma.interest.item_encoder, False)
    bank = torch.randn(len(tiny.catalog().item_ids), WIDE.hidden_size)
    state = StepState(bank=bank if encoder == "bank" else None)
    with FlopCounterMode(display=False) as counter:
        step = JointStep(objective, "full" if encoder == "full" else "frozen")
        step(karma, batch, state).loss.backward()  # type: ignore[no-untyped-call]
    useful = joint_flops(
        karma, batch, objective.built, encoder=encoder,
    )  # fmt: skip
    wasted = 0.0
    for body, _, _, tokens, pairs in passes:
        own: Any = "adapters" if "rank" in case else "all"
        if body is karma.interest.item_encoder.body and encoder != "full":
            own = "no gradient"
        elif body is getattr(karma.decodability, "body", None):  # the private one is frozen
            own = "nothing"
        wasted += BodyCost.of(body).step(tokens, pairs, own)
    assert useful + wasted == pytest.approx(counter.get_total_flops(), rel=0.015)


@pytest.mark.parametrize("query_mode", ["embed_pool", "encoder"])
@pytest.mark.parametrize("kept", [False, True])
def test_of_frozen_layers_a_step_costs_the_forward_pass_or_nothing(
    passes: list[Pass], tmp_path: Path, kept: bool, query_mode: str
) -> None:
    karma, batch = _wide({"train_layers": 1, "query_mode": query_mode}), tiny.batch()
    encoder = karma.interest.item_encoder
    table = _states(encoder, tmp_path)
    passes.clear()
    encoder.states = table if kept else None
    with FlopCounterMode(display=False) as counter:
        JointStep(ObjectiveConfig())(karma, batch).loss.backward()  # type: ignore[no-untyped-call]
    useful = joint_flops(karma, batch, ObjectiveConfig().built, encoder="full")
    wasted, config, inside = 0.0, encoder.body.config, WIDE.hidden_size
    tokens = int(batch.item_lengths.sum())
    if query_mode == "encoder":
        tokens += int((batch.query_lengths + 1).sum())
    for body, _, _, padding, pairs in passes:
        if body is encoder.body:
            lower, upper = BodyCost.of(body, 1), BodyCost.of(body, 1)
            wasted += lower.forward(padding, pairs) + upper.step(padding, pairs, "all")
            tokens += padding
        else:
            wasted += BodyCost.of(body).step(padding, pairs, "all")
    if kept:  # these passes are not watched
        real = torch.arange(batch.item_tokens.shape[1]) < batch.item_lengths[:, None]
        rows, slots = real.shape
        padding = 0 if worth_packing(real) else rows * slots - int(real.sum())
        seen = int((batch.item_lengths * (batch.item_lengths + 1) // 2).sum())
        wasted += BodyCost.of(encoder.body, 1).step(padding, rows * slots**2 - seen, "all")
        tokens += padding
    # The first trained layer passes no gradient on to the layers below it.
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    wasted -= 2.0 * inside * heads * config.head_dim * tokens
    assert useful + wasted == pytest.approx(counter.get_total_flops(), rel=0.015)
    whole = joint_flops(_wide({"query_mode": query_mode}), batch, ObjectiveConfig().built,
                        encoder="full")  # fmt: skip
    assert useful < whole


def test_padding_duplicates_and_micro_batches_are_not_work() -> None:
    karma, batch = tiny.model(), tiny.batch()
    kinds: dict[str, Any] = {"built": ObjectiveConfig().built, "encoder": "full"}
    wider = replace(batch, item_tokens=torch.nn.functional.pad(batch.item_tokens, (0, 9)))
    assert joint_flops(karma, wider, **kinds) == joint_flops(karma, batch, **kinds)
    own = torch.arange(len(batch.item_rows))
    assert joint_flops(karma, batch, own=own, **kinds) == joint_flops(karma, batch, **kinds)
    halves = [joint_flops(karma, batch, own=part, **kinds) for part in (own[::2], own[1::2])]
    rest = joint_flops(karma, batch, **kinds | {"encoder": "bank"})
    items = joint_flops(karma, batch, **kinds) - rest
    assert sum(halves) - 2 * rest == pytest.approx(items, rel=0.02)  # scores need no item's share
    last = joint_flops(karma, batch, positions="last", **kinds)
    assert last < joint_flops(karma, batch, **kinds)


def test_counting_a_batch_of_64_windows_takes_about_a_millisecond() -> None:
    karma = tiny.model()
    rows = [
        tiny.window([f"i{(7 * user + step) % 48}" for step in range(40)], user=f"u{user}")
        for user in range(64)
    ]
    batch = tiny.batch(tiny.sequences(*rows), num_decoded=4, max_history=40)
    assert batch.num_windows == 64
    times = []
    for _ in range(20):
        started = time.process_time()
        joint_flops(karma, batch, ObjectiveConfig().built, encoder="full")
        times.append(time.process_time() - started)
    assert min(times) < 5e-3  # below 1 ms on an idle core


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),
        ("NVIDIA A100-SXM4-80GB", torch.float16, 312e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, None),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA L40", torch.bfloat16, None),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA B200", torch.bfloat16, 2250e12),
        ("Tesla T4", torch.bfloat16, None),
        ("Tesla T4", torch.float16, 65e12),
        ("Tesla V100-SXM2-16GB", torch.float16, 125e12),
    ],
)
def test_known_accelerators_are_in_the_table(
    name: str, dtype: torch.dtype, peak: float | None
) -> None:
    assert tabled_peak(name, dtype) == peak


def test_another_device_is_measured_once() -> None:
    first = peak_flops("cpu", torch.float32)
    assert 1e8 < first < 1e15
    before = flops._measured_peak.cache_info().hits
    assert peak_flops(torch.device("cpu"), torch.float32) == first
    assert flops._measured_peak.cache_info().hits == before + 1


def test_a_measurement_leaves_the_numbers_that_training_draws() -> None:
    flops._measured_peak.cache_clear()
    before = torch.get_rng_state()
    peak_flops("cpu", torch.float32)
    assert flops._measured_peak.cache_info().misses == 1
    assert torch.equal(torch.get_rng_state(), before)


def _states(encoder: ItemEncoder, folder: Path) -> FrozenStates:
    portions = FrozenPortions(encoder, *tiny.item_tokens(), "float32")
    path = str(folder / "states.npy")
    write_states(path, portions.lengths, WIDE.hidden_size, "float32", portions.encoded)
    return FrozenStates.open(path, portions.lengths)


def _wide(case: dict[str, Any]) -> KarmaModel:
    """A model of some width, where vectors are small beside matrices."""
    user = {name: case[name] for name in ("layout", "query_mode") if name in case}
    decoding = {name: case[name] for name in ("recon_decoder", "recon_cond") if name in case}
    config = ModelConfig(
        tiny=WIDE,
        item_encoder=ItemEncoderConfig(
            lexical=case.get("lexical", 0), train_layers=case.get("train_layers", 0)
        ),
        user_decoder=UserDecoderConfig(**user),
        decodability=DecodabilityConfig(**decoding, max_target_tokens=8),
    )
    bodies = [build_tiny(WIDE, len(tiny.tokenizer().get_vocab()), seed) for seed in (1, 2)]  # type: ignore[attr-defined]
    if "rank" in case:
        for seed, body in enumerate(bodies):
            adapt(body, case["rank"], seed)
    interest = InterestModel(config, *bodies, tiny.tokenizer())
    return KarmaModel(interest, tiny.tokenizer())
