"""The family Llama (2302.13971) and models of its shape: no norms of queries and keys."""

from transformers import LlamaConfig, LlamaModel

from karma_ray.model.backbones.plain_text import PlainText

LLAMA = PlainText("Llama", LlamaModel, LlamaConfig).family()
