"""The type in which a served user decoder computes.

In bfloat16 the layers' weights and stored histories are half as large, and a GPU computes it at
least as fast. A CPU does so only with instructions of its own (AMX, AVX512-BF16), so there it must
be asked for.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from karma_ray.errors import InputError
from karma_ray.model.backbone import compute_in
from karma_ray.model.interest import InterestModel
from karma_ray.retrieval.retriever import Retriever

Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


def chosen(precision: str, device: torch.device) -> Literal["float32", "bfloat16"]:
    """Return the type for a device; raises InputError on an unknown one."""
    if precision not in PRECISIONS:
        raise InputError("precision", precision, "is unknown", PRECISIONS)
    if precision == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if half else "float32"
    return "bfloat16" if precision == "bfloat16" else "float32"


def lower(retriever: Retriever, precision: str) -> Literal["float32", "bfloat16"]:
    """Let the user decoder's layers compute in `precision`; returns the type that was chosen.

    Embeddings, adapters, item vectors, index and scores stay in float32.
    """
    wanted = chosen(precision, retriever.device)
    if wanted == "float32" or not isinstance(retriever.interest, InterestModel):
        return "float32"
    compute_in(retriever.interest.user_decoder.body, torch.bfloat16)
    return wanted
