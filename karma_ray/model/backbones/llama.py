"""The family Llama (2302.13971): no norms of queries and keys; SmolLM2 and others have its shape."""

from transformers import LlamaConfig, LlamaModel

from karma_ray.model.backbones.plain_text import PlainText

LLAMA = PlainText("Llama", LlamaModel, LlamaConfig).family()
