"""What report, card and screen say of the LLM of a run, its cost and its knowledge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from karma_ray.report.account import cost_sentences, llm_sentences, size_sentences
from karma_ray.report.page import render_report
from karma_ray.report.record import read_run
from karma_ray.report.terminal import summary

FILE = "/models/SmolLM2-135M-Instruct-Q4_1.gguf"
SHAPE = {"family": "llama", "layers": 30, "width": 576}
BUNDLE = {
    "num_parameters": 2000000, "num_trained": 300000, "item_layers": 12, "item_layers_frozen": 11,
    "user_layers": 6, "checkpoints": {"item_encoder": SHAPE, "user_decoder": SHAPE},
    "quantised": {"item_encoder": {"quantisation": "Q4_1"}},
}  # fmt: skip
KNOWN = {
    "HR@50": 40.0, "num_test": 9, "paraphrased/HR@50": 31.25, "paraphrased/share_rewritten": 90.2,
    "held_out/HR@50": 12.0,
    "forgetting/encoder_before": 3.0, "forgetting/encoder_after": 3.5,
    "forgetting/decoder_before": 4.0, "forgetting/decoder_after": 3.9,
}  # fmt: skip
LINES = [
    {"stage": "warmup", "step": 10, "seconds": 7.0},
    {"stage": "joint", "step": 10, "seconds": 10.0, "tokens_per_s": 100.0, "mfu": 0.1},
    {"stage": "joint", "step": 40, "seconds": 40.0, "tokens_per_s": 500.0, "mfu": 0.5},
    {"stage": "valid", "step": 40, "seconds": 40.0},
]
COST = {
    "seconds": {"frozen": 1234.0, "embedding": 5.0, "evaluation": 6.0},
    "peak_gib": {"host": 3.0, "gpu": 20.0},
}
Write = Callable[..., str]


@pytest.fixture
def write_llm_run(write_run: Write) -> Write:
    def write(item: str = FILE, user: str = FILE, weights: str = "pretrained") -> str:
        model = {"weights": weights, "item_encoder": {"checkpoint": item},
                 "user_decoder": {"checkpoint": user}}  # fmt: skip
        parts: dict[str, Any] = {
            "config.json": {"recipe": "karma_text", "seed": 3, "model": model},
            "bundle/manifest.json": BUNDLE, "metrics.json": KNOWN, "metrics.jsonl": LINES,
            "cost.json": COST,
            "data.json": {
                "name": "hm", "query_source": "derived", "negative_source": "proxy",
                "near_duplicates": {"grouped": 1200, "items": 17000, "cosine": 0.99},
            },
        }  # fmt: skip
        return write_run(**parts)

    return write


def test_a_part_is_named_with_family_layers_width_and_quantisation(write_llm_run: Write) -> None:
    assert llm_sentences(read_run(write_llm_run())) == [
        "Item encoder: SmolLM2-135M-Instruct-Q4_1.gguf, family llama, 12 of 30 layers, width 576, "
        "from a GGUF file quantised as Q4_1.",
        "User decoder: SmolLM2-135M-Instruct-Q4_1.gguf, family llama, 6 of 30 layers, width 576.",
        "The weights are pretrained.",
    ]


def test_random_weights_are_called_a_control_and_not_quantised(write_llm_run: Write) -> None:
    told = llm_sentences(read_run(write_llm_run(weights="random")))
    assert told[-1].startswith("CONTROL: the weights are RANDOM, not pretrained")
    assert "quantised" not in " ".join(told)


def test_tiny_bodies_and_hub_names_are_told_as_they_are(write_llm_run: Write) -> None:
    assert llm_sentences(read_run(write_llm_run(item="tiny", user="tiny"))) == []
    told = llm_sentences(read_run(write_llm_run(item="tiny", user="Qwen/Qwen3-0.6B")))
    assert told[0].startswith("User decoder: Qwen/Qwen3-0.6B, family")


def test_speeds_are_means_over_the_time_of_joint_training(write_llm_run: Write) -> None:
    assert cost_sentences(read_run(write_llm_run())) == [
        "Seconds: states of frozen layers 1,234, warm-up 7, joint training 40, embedding the "
        "catalogue 5, evaluation 6.",
        "1 s a joint step, 400 tokens/s, 40.0 % of the devices' peak in matrix products (mfu), "
        "peak memory 3.0 GiB, of the GPU 20.0 GiB.",
    ]


def test_near_duplicates_are_counted(write_llm_run: Write) -> None:
    assert size_sentences(read_run(write_llm_run()))[1].startswith(
        "1,200 of 17,000 items have near-duplicates (cosine above 0.99)"
    )


def test_page_card_and_screen_say_the_same(write_llm_run: Write) -> None:
    run = write_llm_run()
    page = " ".join(Path(render_report(run)).read_text().replace("&#39;", "'").split())
    card = " ".join(Path(run, "report", "model_card.md").read_text().split())
    screen = " ".join(summary(run).split())
    for sentence in (
        "family llama, 12 of 30 layers", "The weights are pretrained.",
        "300,000 of the 2,000,000 weights learn", "joint training 40", "400 tokens/s",
        "item encoder 3.00 to 3.50 (+0.50); user decoder 4.00 to 3.90 (-0.10)",
        "With 90 % of the queries in other words, HR@50 goes from 40.0 to 31.2",
        "HR@50 on categories held out of training: 12.0",
    ):  # fmt: skip
        assert sentence in page and sentence in card and sentence in screen, sentence
    assert "<td>item encoder</td><td>3.00</td><td>3.50</td><td>+0.50</td>" in page
    for note in ("Clicks on categories that no training click had", "The test again, with queries"):
        assert note in page


def test_the_screen_with_everything_fits_fifty_lines(write_llm_run: Write) -> None:
    lines = summary(write_llm_run()).splitlines()
    assert len(lines) <= 50
    assert all(len(line) <= 100 for line in lines if "run" not in line.split("/"))


def test_a_run_without_such_records_says_nothing_of_them(write_run: Write) -> None:
    run = write_run(**{"metrics.jsonl": None})
    assert cost_sentences(read_run(run)) == [] and size_sentences(read_run(run)) == []
    render_report(run)
    assert "Model and cost" not in Path(run, "report", "report.html").read_text()
