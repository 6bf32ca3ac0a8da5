"""The family Qwen2 (2407.10671) and 2.5: text bodies with biased queries, keys and values."""

from transformers import Qwen2Config, Qwen2Model

from karma_ray.model.backbones.plain_text import PlainText

QWEN2 = PlainText("Qwen2", Qwen2Model, Qwen2Config).family()
