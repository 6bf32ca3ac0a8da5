"""One small toy shop for every run of these tests; who changes a shop writes one of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> str:
    """240 items and 120 users; prepared by the first run that reads it."""
    folder = str(tmp_path_factory.mktemp("shop"))
    write_toy_shop(folder, ToyShopConfig(num_items=240, num_users=120))
    return folder


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """In the block a training is interrupted after it has saved its first checkpoint."""
    from karma_ray.training.checkpoints.store import CheckpointStore

    save = CheckpointStore.save

    def cut(self: Any, *arguments: Any, **options: Any) -> None:
        save(self, *arguments, **options)
        raise KeyboardInterrupt

    @contextmanager
    def block() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointStore, "save", cut)
            with pytest.raises(KeyboardInterrupt):
                yield

    return block
