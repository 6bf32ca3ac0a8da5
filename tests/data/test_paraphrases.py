"""Other words for queries: how a table rewrites, and that the table of `hm` is fair."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from karma_ray.data.importers.hm import hm_items
from karma_ray.data.paraphrases import Paraphrases
from karma_ray.data.schema import EXAMPLES
from karma_ray.errors import InputError

GROUPS = {"ladieswear", "menswear", "divided", "sport", "baby/children"}


@pytest.fixture(scope="module")
def hm() -> Paraphrases:
    return Paraphrases.load("hm")


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def alike(one: str, other: str) -> bool:
    """Whether two words may have one stem: equal beginnings, of up to 5 letters."""
    size = min(len(one), len(other), 5)
    return size >= 3 and one[:size] == other[:size]


def test_phrases_cover_a_query_whole_or_leave_it(hm: Paraphrases) -> None:
    made = Paraphrases("x", {"vest": "a", "vest top": "b", "top": "c", "red": "d"})
    assert made.rewrite("Red  VEST top") == "d b"  # the longest phrase first
    assert made.rewrite("top vest") == "c a"
    for query in ("red socks", "vests", "", "  ", None):
        assert made.rewrite(query) is None
    assert hm.rewrite("ladieswear vest top") == "women sleeveless tank"
    assert hm.rewrite("baby/children underwear tights") == "youngsters sheer pantyhose"


def test_only_queries_change_and_unknown_ones_keep_their_text(hm: Paraphrases) -> None:
    rows = [
        {"user_id": f"u{n}", "query": query, "history_queries": ["ladieswear dress"]}
        for n, query in enumerate(["menswear tie", None, "lost keys", "menswear tie"])
    ]
    examples = pa.Table.from_pylist(rows, schema=EXAMPLES)
    after = hm.rewritten(examples)
    assert after.schema == EXAMPLES
    assert after["query"].to_pylist() == ["guys silk cravat", None, "lost keys", "guys silk cravat"]
    assert after.drop_columns(["query"]).equals(examples.drop_columns(["query"]))
    assert hm.num_rewritten(examples) == 2
    hm.check(examples)
    hm.check(examples.slice(0, 0))
    with pytest.raises(InputError, match=r"covers no query of the test, such as 'lost keys'"):
        hm.check(examples.slice(1, 2))
    with pytest.raises(InputError, match=r"of which there are none"):
        hm.check(examples.slice(1, 1))


def test_a_users_own_table_is_read(tmp_path: Path) -> None:
    frame = pl.DataFrame({"phrase": ["Red", "big  shoe"], "paraphrase": ["scarlet", "boot"]})
    frame.write_csv(tmp_path / "a.csv")
    frame.write_csv(tmp_path / "a.tsv", separator="\t")
    frame.write_parquet(tmp_path / "a.parquet")
    tables = [Paraphrases.load(str(tmp_path / f"a.{end}")) for end in ("csv", "tsv", "parquet")]
    assert all(table.table == {"red": "scarlet", "big shoe": "boot"} for table in tables)
    assert len({table.content_hash for table in tables}) == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("phrase,other\na,b\n", "has no column paraphrase; choices: phrase, other"),
        ("phrase,paraphrase\na,\n", "has a row with an empty cell"),
        ("phrase,paraphrase\na,b\nA,c\n", "has two paraphrases of 'a'"),
        ("", "cannot be read"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError, match=r"evaluation\.paraphrases") as raised:
        Paraphrases.load(str(tmp_path / "a.csv"))
    assert problem in str(raised.value)


def test_an_unknown_name_is_refused_with_the_known_tables() -> None:
    for name in ("h&m", "nowhere.tsv"):
        with pytest.raises(InputError, match=r"is neither a known table.*hm"):
            Paraphrases.load(name)


def test_no_two_phrases_of_hm_have_one_paraphrase(hm: Paraphrases) -> None:
    assert len(set(hm.table.values())) == len(hm.table)


def test_no_paraphrase_of_hm_has_a_word_or_stem_of_any_query(hm: Paraphrases) -> None:
    asked = set().union(*map(words, hm.table))
    shared = {
        (phrase, word, other)
        for phrase, paraphrase in hm.table.items()
        for word in words(paraphrase)
        for other in asked
        if word == other or alike(word, other)
    }
    assert not shared


def test_no_paraphrase_of_hm_holds_a_word_of_its_own_phrase(hm: Paraphrases) -> None:
    for phrase, paraphrase in hm.table.items():
        assert not [word for word in words(phrase) if len(word) > 2 and word in paraphrase]


def test_every_type_and_group_of_hm_is_covered(hm: Paraphrases, shared_data: Path) -> None:
    articles = pl.read_parquet(shared_data / "hm" / "articles.parquet")
    types = set(articles["product_type_name"].str.to_lowercase()) - {"unknown"}
    assert set(hm.table) == types | GROUPS
    assert set(articles["index_group_name"].str.to_lowercase()) == GROUPS
    queries = hm_items(articles)["query"].drop_nulls().unique()
    rewritten = [hm.rewrite(query) for query in queries]
    assert None not in rewritten and len(set(rewritten)) == len(queries) > 200
