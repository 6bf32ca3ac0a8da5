"""How pictures enter Qwen3-VL's input, and faster layers for its vision tower.

The body is the Qwen3 body of a text encoder that also holds the vision tower as `visual`. An item
without a picture is computed exactly like a text item. With a picture the input is

    instruction <|vision_start|> K image tokens <|vision_end|> text <|endoftext|>

The image tokens have positions in a plane (M-RoPE, 2409.12191), and further features are added to
them after the first layers (DeepStack, 2406.04334).

Legend: U items, n of them with a picture, S slots without it, S' with it, P instruction tokens,
K image tokens of a picture (G on a side), N patches, D width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from karma_ray.model.backbones.family import BodyInput
from karma_ray.model.layers import rotated


def cut_patches(pixels: Tensor, patch: int, merge: int, temporal: int) -> tuple[Tensor, Tensor]:
    """Cut normalised pixels [n, 3, S, S] into patches [n * N, 3 * temporal * patch**2].

    Also returns grids [n, 3] (frames, rows, columns), both as Qwen2VLImageProcessor makes them:
    patches that are merged later are adjacent, and a still picture fills all `temporal` frames.
    """
    count, channels, side, _ = pixels.shape
    rows = side // patch
    blocks = rows // merge
    cut = pixels.reshape(count, channels, blocks, merge, patch, blocks, merge, patch)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [n, bh, bw, mh, mw, C, ph, pw]
    frames = cut.unsqueeze(6).expand(*cut.shape[:6], temporal, patch, patch)
    grids = torch.tensor([[1, rows, rows]], device=pixels.device).expand(count, -1)
    return frames.reshape(count * rows * rows, channels * temporal * patch * patch), grids


def insert_pictures(
    body: nn.Module, embeddings: Tensor, last: Tensor, num_prefix: int, pictured: Tensor,
    pixels: Tensor, *, learns: bool = True,
) -> BodyInput:  # fmt: skip
    """Insert pictures [n, S, S, 3] uint8 after the first `num_prefix` slots of `pictured` [U].

    embeddings [U, S, D], last [U]. Items without a picture keep their slots and positions. The
    vision tower gets gradients only if it `learns`.
    """
    if not len(pixels):
        return BodyInput(embeddings, None, last, ())
    num_items, num_slots = embeddings.shape[:2]
    config = cast(Any, body).whole_config
    with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
        tokens, deep = _picture_features(body, pixels)  # [n, K, D]
    count = tokens.shape[1]
    side, added = round(count**0.5), count + 2
    slots = torch.arange(num_slots + added, device=embeddings.device).expand(num_items, -1)
    shift = added * pictured.long()[:, None]
    source = torch.where(slots < num_prefix, slots, slots - shift).clamp(0, num_slots - 1)
    wide = embeddings.gather(1, source[..., None].expand(-1, -1, embeddings.shape[2]))
    marks = (
        cast(Any, body)
        .embed_tokens.weight[[config.vision_start_token_id, config.vision_end_token_id]]
        .to(wide.dtype)
    )
    start, end = (mark.expand(len(tokens), 1, -1) for mark in marks)
    wide[pictured, num_prefix : num_prefix + added] = torch.cat(
        [start, tokens.to(wide.dtype), end], 1
    )
    first = num_prefix + 1
    positions = slots[..., None].repeat(1, 1, 3)
    plane = torch.cartesian_prod(torch.arange(side), torch.arange(side)).to(slots.device)
    places = first + functional.pad(plane, (1, 0))  # [K, 3]
    positions[pictured, first : first + count] = places
    # After a picture, positions continue as if only its longer side had been read.
    positions[pictured, first + count :] -= count - side
    layers = []
    for feature in deep:
        layer = torch.zeros_like(wide)
        layer[pictured, first : first + count] = feature.to(wide.dtype)
        layers.append(layer)
    return BodyInput(wide, positions, last + shift[:, 0], tuple(layers))


def add_vision_tower(body: nn.Module, visual: nn.Module, rotary: nn.Module, config: Any) -> None:
    """Add a vision tower to a text body, with plane positions and DeepStack hooks on its layers.

    `config` is Qwen3-VL's, with `image_mean` and `image_std` of its processor.
    """
    multimodal = cast(Any, body)
    multimodal.visual, multimodal.rotary_emb, multimodal.whole_config = visual, rotary, config
    tower = cast(Any, visual)
    tower.patch_embed = PatchProjection(tower.patch_embed)
    for block in tower.blocks:
        block.attn = PictureAttention(block.attn)
    for number in range(len(config.vision_config.deepstack_visual_indexes)):
        multimodal.layers[number].register_forward_hook(_Deepening(number), with_kwargs=True)


def block_side(body: nn.Module) -> int:
    """Return the side, in pixels, of the block that becomes one token."""
    config = cast(Any, body).whole_config.vision_config
    return int(config.patch_size * config.spatial_merge_size)


class PatchProjection(nn.Module):
    """The tower's first layer as a matrix product.

    The stock module is a convolution whose kernel is as wide as its stride.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.proj = cast(Any, stock).proj

    def forward(self, patches: Tensor) -> Tensor:
        """[n * N, channels * frames * patch**2] -> [n * N, D]."""
        weight = self.proj.weight.flatten(1)
        return functional.linear(patches.to(weight.dtype), weight, self.proj.bias)


class PictureAttention(nn.Module):
    """The tower's attention within each picture, for all pictures at once as they have one size.

    The stock module processes them one by one.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        parts = cast(Any, stock)
        self.qkv, self.proj, self.heads = parts.qkv, parts.proj, int(parts.num_heads)

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **options: Any,
    ) -> Tensor:
        """[n * N, D] -> [n * N, D]; `cu_seqlens` [n + 1] are the first rows of the pictures."""
        count = len(cu_seqlens) - 1
        shape = (count, len(hidden_states) // count, 3, self.heads, -1)
        query, key, value = self.qkv(hidden_states).view(shape).unbind(2)  # [n, N, H, d]
        cos, sin = (
            table.view(*query.shape[:2], 1, -1).to(query.dtype) for table in position_embeddings
        )
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        states = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        return cast(Tensor, self.proj(states.transpose(1, 2).reshape(len(hidden_states), -1)))


class _Deepening:
    """Adds the DeepStack features of one layer to its output, in passes with pictures."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Tensor
    ) -> Tensor:
        deep = options.get("deep") or ()
        return output + deep[self.number] if self.number < len(deep) else output


def _picture_features(body: nn.Module, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return image tokens [n, K, D] and DeepStack features of pictures [n, S, S, 3] uint8."""
    multimodal = cast(Any, body)
    config, count = multimodal.whole_config.vision_config, len(pixels)
    mean, std = (
        torch.tensor(values, device=pixels.device)
        for values in (multimodal.whole_config.image_mean, multimodal.whole_config.image_std)
    )
    normal = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    patches, grids = cut_patches(
        normal, config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    )
    seen = multimodal.visual(patches, grid_thw=grids)
    tokens = seen.pooler_output.view(count, -1, seen.pooler_output.shape[-1])
    return tokens, [deep.view(tokens.shape) for deep in seen.deepstack_features]
