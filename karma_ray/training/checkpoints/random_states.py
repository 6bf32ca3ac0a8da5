"""All random states of a worker as files: torch, accelerator, Python and a NumPy generator."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from karma_ray.artifacts import read_json


def random_states(generator: np.random.Generator | None, rank: int) -> dict[str, bytes]:
    """Return this worker's random states as file name -> content."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    numpy_state = None if generator is None else generator.bit_generator.state
    states = {"python": random.getstate(), "numpy": numpy_state}
    return {
        f"random-{rank}.safetensors": save(tensors),
        f"random-{rank}.json": json.dumps(states).encode(),
    }


def restore_random_states(source: Path, generator: np.random.Generator | None, rank: int) -> None:
    """Restore the states that `random_states` saved; `source` is a local folder."""
    tensors = load_file(source / f"random-{rank}.safetensors")
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    states = read_json(str(source / f"random-{rank}.json"))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if generator is not None and states["numpy"] is not None:
        generator.bit_generator.state = states["numpy"]
