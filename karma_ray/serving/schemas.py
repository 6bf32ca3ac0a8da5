"""The bodies of the HTTP interface.

Unknown fields are refused, so that a misspelt `exclude_histroy` is not silently ignored.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from karma_ray.retrieval.requests import HistoryItem

MAX_K = 5000
"""Largest number of retrieved items; the paper measures HR@5000 (method 1.13)."""
MAX_CANDIDATES = 20_000
"""Largest number of items that one request may score."""

ItemId = Annotated[str, Field(min_length=1, max_length=512)]
UserId = Annotated[str, Field(min_length=1, max_length=512)]
Query = Annotated[str | None, Field(max_length=4096)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class HistoryEntry(_Body):
    """One past click. Oldest first, or in any order if every entry has a timestamp."""

    item_id: ItemId
    query: Query = None
    timestamp: datetime | None = None

    def click(self) -> HistoryItem:
        """Return it as the retriever reads it; a time without a zone is UTC."""
        at = self.timestamp
        if at is not None and at.tzinfo is None:
            at = at.replace(tzinfo=UTC)
        return HistoryItem(self.item_id, self.query, at)


class _RequestBody(_Body):
    query: Query = None
    history: Annotated[list[HistoryEntry], Field(max_length=10_000)] | None = None
    """Past clicks. Without it the clicks that `/v1/events` stored for `user_id` are used."""
    user_id: UserId | None = None


class RecallRequest(_RequestBody):
    """The current query of a user, and past clicks."""

    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10
    exclude_history: bool = False
    exclude: Annotated[list[ItemId], Field(max_length=10_000)] = []
    """Items that are not wanted."""
    category: Annotated[str | None, Field(max_length=512)] = None
    """Only items of this category."""


class ScoreRequest(_RequestBody):
    """Candidates to score for a user."""

    item_ids: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_CANDIDATES)]


class RankRequest(RecallRequest):
    """Candidates to order by their chance of a click: `item_ids`, or what recall finds."""

    item_ids: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_CANDIDATES)] | None = None
    """Given candidates. Without them, recall's answer to the other fields is ranked."""
    k: Annotated[int, Field(ge=1, le=MAX_K)] = 100


class FeaturesRequest(ScoreRequest):
    """Candidates whose similarities to a user's history are wanted, as features of a ranker."""


class EventRequest(HistoryEntry):
    """A click of a user, appended to what the endpoint stores of that user."""

    user_id: UserId


class Item(TypedDict):
    """One retrieved item."""

    item_id: str
    score: float
    """By which the items are sorted: the model's, or that of the blend of several lists."""
    title: str


class Version(TypedDict):
    """Content hashes of the model and the index that answered."""

    model_version: str
    index_version: str


class RecallResponse(Version):
    """The best items, best first."""

    items: list[Item]
    ignored_item_ids: list[str]


class ScoreResponse(Version):
    """The model's score of each requested item, in order; null for an unknown item."""

    scores: list[float | None]
    ignored_item_ids: list[str]


class Features(TypedDict):
    """Similarities of one candidate to a user."""

    score: float
    """As in /v1/score."""
    max: float
    """Largest cosine to an item of the history; 0 without a history, as the next ones."""
    mean: float
    top5_mean: float
    tiers: list[float]
    """Share of the history in each of ten equal ranges of the cosine from -1 to 1 (SimTier)."""


class FeaturesResponse(Version):
    """Features of each candidate, in order; null for one that the catalogue does not hold."""

    features: list[Features | None]
    ignored_item_ids: list[str]


class RankedItem(TypedDict):
    """One candidate."""

    item_id: str
    ctr: float
    """The chance of a click if it is shown."""
    score: float
    """As in recall; of given candidates as in /v1/score."""
    title: str


class Stages(TypedDict):
    """Milliseconds of each stage, for all requests that were computed together."""

    recall: float
    """Interest, and search or scores of given candidates."""
    features: float
    rank: float


class RankResponse(Version):
    """Candidates by falling chance of a click."""

    items: list[RankedItem]
    ignored_item_ids: list[str]
    """Unknown items of the history and of the candidates."""
    stages_ms: Stages
    ranker_version: str


class EventResponse(TypedDict):
    """What is stored of the user now."""

    num_clicks: int
    known: bool
    """Whether the catalogue holds the item; clicks on others are not stored."""


class Health(TypedDict):
    """The answer once model and index are loaded."""

    status: str
    num_items: int


class ArmVersion(Version):
    """What answers the users of one arm of an experiment."""

    arm: str
    share: float
    """Share of the users; the first arm answers the rest."""


class Versions(Version):
    """What the running endpoint answers with; the hashes outside `arms` are of the first arm."""

    karma_ray: str
    index_kind: str
    channels: str
    """`dense` if recall answers by the model alone, `blend` if by several lists."""
    precision: str
    """In which the user decoder computes: float32 or bfloat16."""
    ranker_version: str | None
    """Content hash of the ranker behind `/v1/rank`."""
    arms: list[ArmVersion]
