"""The family Qwen3 (2505.09388): text bodies with normalised queries and keys."""

from transformers import Qwen3Config, Qwen3Model

from karma_ray.model.backbones.plain_text import PlainText

QWEN3 = PlainText("Qwen3", Qwen3Model, Qwen3Config).family()
