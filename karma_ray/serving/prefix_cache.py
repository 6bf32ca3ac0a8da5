"""A bounded cache of history states, found by their content.

A state is a function of its steps and the model, so users with equal histories share it, and no
answer depends on what is cached. The key of a history is a chain of hashes, one per step, so that
one pass over a history finds its longest stored beginning.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from karma_ray.model.incremental import HistoryState, Step


@dataclass
class CacheCounts:
    """What happened since the start."""

    whole: int = 0
    """Requests whose whole history was stored."""
    part: int = 0
    """Requests of which a beginning was stored."""
    none: int = 0
    """Requests with a history of which nothing was stored."""
    evicted: int = 0


class PrefixCache:
    """Least recently used states leave when `max_bytes` are exceeded. For one thread."""

    def __init__(self, empty: HistoryState, max_bytes: int) -> None:
        """`empty` is the state without any step, which is always there."""
        self.max_bytes, self.counts, self.num_bytes = max_bytes, CacheCounts(), 0
        self._empty = empty
        self._states: OrderedDict[int, HistoryState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def longest(self, steps: Sequence[Step]) -> tuple[HistoryState, Sequence[int]]:
        """Return the state of the longest stored beginning of `steps`, and the keys of all."""
        keys = _chain(steps)
        for size in range(len(steps), 0, -1):
            state = self._states.get(keys[size - 1])
            # Equal hashes of different histories are possible, though nobody will live to see it.
            if state is not None and state.steps == tuple(steps[:size]):
                self._states.move_to_end(keys[size - 1])
                whole = size == len(steps)
                self.counts.whole += whole
                self.counts.part += not whole
                return state, keys
        self.counts.none += bool(steps)
        return self._empty, keys

    def put(self, state: HistoryState, keys: Sequence[int]) -> None:
        """Store a state of some steps, whose keys `longest` gave; drop others if too many."""
        self._remove(keys[-1])
        self._states[keys[-1]] = state
        self.num_bytes += state.num_bytes
        # The state that this one continues will hardly be asked for again.
        for size in range(len(keys) - 1, 0, -1):
            if keys[size - 1] in self._states:
                self._states.move_to_end(keys[size - 1], last=False)
                break
        while self.num_bytes > self.max_bytes and self._states:
            self._remove(next(iter(self._states)))
            self.counts.evicted += 1

    def _remove(self, key: int) -> None:
        state = self._states.pop(key, None)
        self.num_bytes -= 0 if state is None else state.num_bytes


def _chain(steps: Sequence[Step]) -> list[int]:
    """Return a hash of each beginning of `steps`."""
    keys, key = [], 0
    for step in steps:
        key = hash((key, step))
        keys.append(key)
    return keys
