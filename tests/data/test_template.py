"""SQL texts of the user's: comments and braces in them do no harm."""

from __future__ import annotations

from typing import Any

import pytest

from whalefall.data import Session
from whalefall.data.errors import PlanError
from whalefall.data.template import fragment, without_comments


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("a > 1 -- the rest", "a > 1"),
        ("a -- one\n+ b", "a \n+ b"),
        ("a -- one\r+ b", "a \r+ b"),
        ("a /* /* two */ levels */ + b", "a   + b"),
        ("a /* don't */ || 'x'", "a   || 'x'"),
        ('\'-- no\' || "/* no""--"', '\'-- no\' || "/* no""--"'),
        (r"e'it\'s -- in' || 'a\' -- out", r"e'it\'s -- in' || 'a\'"),
        ("'it''s -- in' -- out", "'it''s -- in'"),
        ("$$ -- in $$ || $t$ $$ -- in $t$ -- out", "$$ -- in $$ || $t$ $$ -- in $t$"),
        ("$1 + 'open -- in", "$1 + 'open"),
        ("", ""),
    ],
)
def test_comments_are_told_from_quoted_text(text: str, bare: str) -> None:
    assert without_comments(text) == bare


def test_a_comment_without_end_and_a_text_of_comments_are_refused(sp: Session) -> None:
    with pytest.raises(PlanError, match=r"has no end, in: a /. b"):
        without_comments("a /* b")
    with pytest.raises(PlanError, match="filter: the SQL text is '-- all', wanted an expression"):
        sp.from_items([1]).filter("-- all")
    assert fragment(" a ", "x") == "a"


def values(frame: Any) -> list[Any]:
    return [next(iter(row.values())) for row in frame.take_all()]


def test_a_comment_at_the_end_of_any_sql_text_cuts_nothing_off(sp: Session) -> None:
    frame = sp.from_items([{"a": i, "b": i % 2} for i in (3, 1, 2)])
    assert values(frame.filter("a > 1 -- big").map("a * 2 as x -- {0} twice").sort("x")) == [4, 6]
    assert values(frame.flat_map("unnest([a, a]) as x -- two").sort("x -- up")) == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert values(frame.partial_sort(["b desc -- odd", "a -- up"])) == [1, 3, 2]
    assert values(frame.sort("a desc -- down", npartitions=2)) == [3, 2, 1]
    for parts in (None, 2):
        grouped = frame.group_by("b as k -- key", npartitions=parts).agg(n="sum(a) -- all")
        assert values(grouped.sort("k").map("n")) == [2, 4]
        assert values(frame.join(frame, "a", npartitions=parts).map("a").sort("a")) == [1, 2, 3]
    assert frame.repartition(2, hash_by=["a -- x", "b -- y"]).count() == 3
    assert values(frame.repartition(2, by="b -- parity").map("a")) == [2, 3, 1]
    assert values(sp.partial_sql("select a from {0} where b = 0; -- done", frame)) == [2]
    assert values(sp.sql("select max(a) from f; -- {done}", f=frame)) == [3]
