"""Which LLM a run used, how much of it learnt, what that cost, and what the LLM's knowledge did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from karma_ray.report.record import RunRecord, number

PARTS = {"item_encoder": "item encoder", "user_decoder": "user decoder"}
_LAYERS = {"item_encoder": "item_layers", "user_decoder": "user_layers"}
STAGES = {
    "frozen": "states of frozen layers",
    "pretrain": "pretraining",
    "warmup": "warm-up",
    "joint": "joint training",
    "ctr": "training",
    "embedding": "embedding the catalogue",
    "evaluation": "evaluation",
}
"""Stages in the order of a run. Those kept in the cache count as when they were computed."""
FORGETTING = {"encoder": "item encoder", "decoder": "user decoder"}


def llm_sentences(record: RunRecord) -> list[str]:
    """Return which LLM each part is and where its weights come from; nothing of tiny bodies."""
    model = record.config.get("model", {})
    named = [part for part in PARTS if model.get(part, {}).get("checkpoint", "tiny") != "tiny"]
    described = {part: _described(record, part) for part in named}
    if not described:
        return []
    texts = list(dict.fromkeys(described.values()))
    if len(texts) == 1 and len(described) == 2:
        told = [f"Item encoder and user decoder: {texts[0]}."]
    else:
        told = [f"{PARTS[p][0].upper()}{PARTS[p][1:]}: {text}." for p, text in described.items()]
    if not _is_random(record):
        return [*told, "The weights are pretrained."]
    return [
        *told,
        "CONTROL: the weights are RANDOM, not pretrained (model.weights=random); only shapes and "
        "tokenizer are the checkpoint's.",
    ]


def _is_random(record: RunRecord) -> bool:
    return bool(record.config.get("model", {}).get("weights") == "random")


def _described(record: RunRecord, part: str) -> str:
    """Name, family, layers, width and quantisation, as far as they are known."""
    named = str(record.config["model"][part]["checkpoint"])
    if named.startswith(("/", ".", "~")):
        named = named.rstrip("/").rpartition("/")[2]
    shape: Mapping[str, Any] = record.bundle.get("checkpoints", {}).get(part, {})
    parts = [named]
    if shape:
        used = record.bundle.get(_LAYERS[part], shape["layers"])
        parts += [
            f"family {shape['family']}",
            f"{used} of {shape['layers']} layers",
            f"width {shape['width']}",
        ]
    origin = record.bundle.get("quantised", {}).get(part)
    if origin and not _is_random(record):
        parts.append(f"from a GGUF file quantised as {origin['quantisation']}")
    return ", ".join(parts)


_SIZES = ("num_parameters", "num_trained", "item_layers", "item_layers_frozen", "user_layers")
"""What the bundle's manifest says of the model."""


def size_sentences(record: RunRecord) -> list[str]:
    """Return what of the model learnt, and the near-duplicates; nothing that was not recorded."""
    told = []
    facts = {name: number(record.bundle.get(name)) for name in _SIZES}
    whole, trained, layers, frozen, user = facts.values()
    if whole is not None and trained is not None:
        share = "All" if trained == whole else f"{trained:,.0f} of the"
        sentence = f"{share} {whole:,.0f} weights learn"
        if frozen:
            top = (layers or 0) - frozen
            sentence += f", of the item encoder the top {top:.0f} of {layers:.0f} layers"
        if record.config.get("model", {}).get("user_decoder", {}).get("layers"):
            sentence += f"; the user decoder is the first {user:.0f} layers of its checkpoint"
        told.append(f"{sentence}.")
    groups = record.data.get("near_duplicates")
    if groups:
        told.append(
            f"{groups['grouped']:,} of {groups['items']:,} items have near-duplicates (cosine "
            f"above {groups['cosine']:g}), which are no negatives of each other."
        )
    return told


def cost_sentences(record: RunRecord) -> list[str]:
    """Return the seconds of each stage, and the speed and memory of the run, where recorded."""
    seconds = dict(record.cost.get("seconds", {}))
    for line in record.lines:
        if line.get("stage") in STAGES and number(line.get("seconds")) is not None:
            seconds[line["stage"]] = line["seconds"]  # the stage's time so far
    stages = [f"{name} {seconds[key]:,.0f}" for key, name in STAGES.items() if key in seconds]
    return [*([f"Seconds: {', '.join(stages)}."] if stages else []), *_speed(record)]


def _speed(record: RunRecord) -> list[str]:
    """Means over the time of joint training, and the peak memory of the largest process."""
    parts = []
    lines = [line for line in record.stage_lines("joint") if line.get("seconds")]
    if lines and lines[-1]["step"]:
        parts.append(f"{lines[-1]['seconds'] / lines[-1]['step']:.3g} s a joint step")
    rate, share = _over_time(lines, "tokens_per_s"), _over_time(lines, "mfu")
    if rate is not None:
        parts.append(f"{rate:,.0f} tokens/s")
    if share is not None:
        parts.append(f"{100 * share:.1f} % of the devices' peak in matrix products (mfu)")
    peaks = record.cost.get("peak_gib", {})
    names = {"host": "peak memory", "gpu": "of the GPU"}
    parts += [f"{name} {peaks[key]:.1f} GiB" for key, name in names.items() if key in peaks]
    if not parts:
        return []
    return [f"{parts[0][0].upper()}{parts[0][1:]}{''.join(f', {p}' for p in parts[1:])}."]


def _over_time(lines: list[dict[str, Any]], name: str) -> float | None:
    """Mean of a log weighted by the seconds of its reports."""
    before, total, weight = 0.0, 0.0, 0.0
    for line in lines:
        spent, before = line["seconds"] - before, line["seconds"]
        value = number(line.get(name))
        if value is not None:
            total, weight = total + value * spent, weight + spent
    return total / weight if weight > 0 else None


def forgetting_rows(record: RunRecord) -> list[tuple[str, float, float]]:
    """Return (part, nats before, nats after) of each part whose forgetting was measured."""
    rows = []
    for key, name in FORGETTING.items():
        before, after = (
            number(record.metrics.get(f"forgetting/{key}_{when}")) for when in ("before", "after")
        )
        if before is not None and after is not None:
            rows.append((name, before, after))
    return rows


def knowledge_sentences(record: RunRecord) -> list[str]:
    """Return what the metrics say of knowledge that clicks did not teach, where measured."""
    told = []
    rows = forgetting_rows(record)
    if rows:
        changes = "; ".join(
            f"{name} {before:.2f} to {after:.2f} ({after - before:+.2f})"
            for name, before, after in rows
        )
        told.append(
            f"Forgetting, nats per token on texts that are no items: {changes}; a rise is lost."
        )
    whole = number(record.metrics.get("HR@50"))
    again = number(record.metrics.get("paraphrased/HR@50"))
    if whole is not None and again is not None:
        share = number(record.metrics.get("paraphrased/share_rewritten"))
        some = "the queries" if share is None else f"{share:.0f} % of the queries"
        told.append(
            f"With {some} in other words, HR@50 goes from {whole:.1f} to {again:.1f}: a drop "
            "is what hung on the words themselves."
        )
    apart = number(record.metrics.get("held_out/HR@50"))
    if apart is not None:
        told.append(
            f"HR@50 on categories held out of training: {apart:.1f}, which only their texts can "
            "have given."
        )
    return told
