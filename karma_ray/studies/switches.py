"""Tables of choices that the paper leaves open, with one row per alternative.

Each row differs from its table's baseline in one switch, and in settings that the switch needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from karma_ray.studies.rows import Row, Table


@dataclass(frozen=True)
class Switch:
    """A field and its values other than the default."""

    path: str
    values: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """Settings that the values need."""

    @property
    def field(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    def rows(self, recipe: str, needs_images: bool = False) -> list[Row]:
        """Return one row per value over `recipe`."""
        return [
            Row(
                f"{self.field}_{value.replace(':', '_')}", f"{self.field}={value}", recipe=recipe,
                settings=(*self.needs, f"{self.path}={value}"), needs_images=needs_images,
            )
            for value in self.values
        ]  # fmt: skip


_QUERY_LAST = ("model.user_decoder.layout=query_last",)

TEXT = (
    Switch("model.user_decoder.layout", ("items_only", "query_last")),
    Switch("model.user_decoder.query_mode", ("encoder", "none")),
    Switch("model.user_decoder.query_mode", ("tokens",), _QUERY_LAST),
    Switch("model.item_encoder.pool", ("emb_token", "mean")),
    Switch("model.item_encoder.lexical", ("16",)),
    Switch("model.score.kind", ("dot", "cos_learned")),
    Switch("model.decodability.recon_cond", ("fig1",)),
    Switch("model.decodability.recon_decoder", ("separate", "light:1", "frozen")),
    Switch("model.decodability.recon_detach_h", ("true",)),
    Switch("model.decodability.recon_text", ("shuffled",)),
    Switch("model.decodability.recon_token_dropout", ("0.5",)),
    Switch("model.decodability.share_projector", ("false",)),
    Switch("model.decodability.task1_see_readout", ("false",)),
    Switch("model.peft", ("lora:8",)),
    Switch("objective.act_positions", ("last",)),
    Switch("objective.action_loss", ("infonce", "bce", "mse")),
    Switch("objective.act_reduction", ("paper_sum",)),
    Switch("objective.ce_reduction", ("sum",)),
    Switch("collate.num_decoded", ("1", "0")),
    Switch("training.encoder_grad", ("targets_only", "head", "frozen")),
    Switch("warmup.train", ("adapters_only", "all")),
    Switch("warmup.skip", ("true",)),
)
"""Switches over `karma_text`."""

IMAGE = (
    Switch("model.imagery.img_cond", ("task1", "task2")),
    Switch("model.imagery.img_head", ("ddpm_eps", "ddpm_v", "ddpm_x0", "edm", "mse")),
    Switch("model.imagery.img_sees_text", ("true",)),
    Switch("model.imagery.denoiser.times", ("logit_normal",)),
    Switch("model.imagery.denoiser.shift", ("3.0",)),
)
"""Switches over `karma_multimodal`; the target is the folder in `collate.visual_features`."""

TABLES = {
    "switches": Table(
        "Open choices, one at a time",
        "karma_text",
        (
            Row("karma_text", "Tasks 1 and 2, defaults"),
            *(row for switch in TEXT for row in switch.rows("karma_text")),
        ),
    ),
    "imagery": Table(
        "The visual term, one choice at a time",
        "karma_multimodal",
        (
            Row("karma_multimodal", "Tasks 1, 2 and visual, defaults", needs_images=True),
            *(row for switch in IMAGE for row in switch.rows("karma_multimodal", True)),
        ),
    ),
}
