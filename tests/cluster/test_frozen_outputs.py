"""A pool of encoders writes the file of frozen outputs that one process writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from karma_ray import recipes
from karma_ray.cluster.frozen_outputs import PortionEncoder, encode_on_ray
from karma_ray.config import override
from karma_ray.model.backbone import save_body
from karma_ray.model.backbones.tokenizer import save_tokenizer
from karma_ray.runs.frozen_outputs import FrozenOutputs
from karma_ray.runs.stages import with_checkpoints
from tests import tiny_run

CHANGES = ["model.item_encoder.train_layers=1", "training.precision=float32"]


@pytest.fixture
def outputs(tmp_path: Path) -> FrozenOutputs:
    """Of a body with two layers, of which one is frozen."""
    words, folder = tiny_run.tokenizer(), str(tmp_path / "llm")
    save_body(tiny_run.interest_model(words).item_encoder.body, folder)
    save_tokenizer(words, folder)
    config = override(recipes.build("toy"), CHANGES)
    config = with_checkpoints(config, folder, folder)
    found = FrozenOutputs.of(config, tiny_run.write_data(tmp_path), folder, str(tmp_path / "cache"))
    assert found is not None
    found.make()
    return found


def test_one_encoder_gives_the_portion_that_the_process_writes(outputs: FrozenOutputs) -> None:
    made = PortionEncoder(outputs)(pa.table({"item": [0]}))
    assert made.column("number").to_pylist() == [0]
    (states,) = made.column("states").to_pylist()
    whole = np.load(outputs.path)
    np.testing.assert_allclose(np.frombuffer(states, np.float32), whole.ravel(), atol=1e-6)


@pytest.mark.ray
def test_a_pool_writes_the_same_file(
    two_cpus: None, outputs: FrozenOutputs, tmp_path: Path
) -> None:
    other = replace(outputs, path=str(tmp_path / "other.npy"))
    other.make(encode_on_ray)
    np.testing.assert_allclose(np.load(other.path), np.load(outputs.path), atol=1e-6)
