from __future__ import annotations

import pytest

from karma_ray.errors import InputError
from karma_ray.report.record import number, read_run


def test_floors_come_before_the_run_and_ceilings_after(write_run) -> None:
    rankers = read_run(write_run()).rankers()
    assert [ranker.name for ranker in rankers] == [
        "popularity", "query_filter", "affinity", "karma_text", "taste_oracle", "oracle",
    ]  # fmt: skip
    assert [ranker.role for ranker in rankers].count("run") == 1


def test_a_floor_run_is_not_listed_twice(write_run) -> None:
    record = read_run(write_run(**{"config.json": {"recipe": "popularity", "seed": 0}}))
    assert [ranker.name for ranker in record.rankers()].count("popularity") == 1
    assert not record.is_trained


def test_absent_pieces_are_empty(write_run) -> None:
    absent = dict.fromkeys(
        ("floors.json", "metrics.jsonl", "checks.json", "report/cases.json", "data.json")
    )
    record = read_run(write_run(**absent))
    assert (record.floors, record.lines, record.checks, record.cases) == ({}, [], {}, [])
    assert record.data_name == "unnamed data"


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path) -> None:
    with pytest.raises(InputError, match=r"run: .*nowhere.* is not a run folder"):
        read_run(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("query_source", "negative_source", "words"),
    [
        ("derived", "proxy", ["DERIVED", "PROXY"]),
        ("real", "exposed", []),
        ("none", "feedback", ["No queries"]),
    ],
)
def test_labels_follow_from_what_the_data_is(
    write_run, query_source: str, negative_source: str, words: list[str]
) -> None:
    data = {"query_source": query_source, "negative_source": negative_source}
    labels = read_run(write_run(**{"data.json": data})).labels()
    assert len(labels) == len(words)
    assert all(word in label for word, label in zip(words, labels, strict=True))


@pytest.mark.parametrize("value", [None, "12", True, float("nan"), float("inf")])
def test_what_is_not_a_finite_number_counts_as_not_measured(value: object) -> None:
    assert number(value) is None
