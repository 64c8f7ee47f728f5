"""The chain state table, cell by cell (3FS reference, section 4)."""

from __future__ import annotations

import itertools

import pytest

from whalefall.errors import ConfigError
from whalefall.fs.cluster import place_chains
from whalefall.fs.core.chains import (
    Chain,
    Local,
    Member,
    Public,
    next_chain,
    next_members,
    read_tail,
)

S, L, Y, W, O = Public
UP, ON, OFF = Local


def after(*cells: tuple[Public, Local]) -> list[Public]:
    """New public state of each member of a chain given as (public, local) pairs."""
    members = tuple(Member(i, i, public) for i, (public, _) in enumerate(cells))
    local = {i: state for i, (_, state) in enumerate(cells)}
    found = {m.target: m.public for m in next_members(members, local)}
    return [found[i] for i in range(len(cells))]


@pytest.mark.parametrize(
    ("cell", "beside_serving", "alone"),
    [
        ((S, UP), S, S), ((S, ON), S, S), ((S, OFF), O, L),
        ((L, UP), O, S), ((L, ON), O, S), ((L, OFF), O, L),
        ((Y, UP), S, S), ((Y, ON), Y, W), ((Y, OFF), O, O),
        ((W, UP), W, W), ((W, ON), Y, W), ((W, OFF), O, O),
        ((O, UP), W, W), ((O, ON), Y, W), ((O, OFF), O, O),
    ],
)  # fmt: skip
def test_table_of_states(cell, beside_serving, alone):  # type: ignore[no-untyped-def]
    assert after(cell) == [alone]
    assert after((S, UP), cell)[1] == beside_serving


def test_of_several_that_die_at_once_the_head_waits_for_all() -> None:
    assert after((S, OFF), (S, OFF), (S, OFF)) == [L, O, O]
    assert after((S, OFF), (S, UP), (S, OFF)) == [O, S, O]


def test_a_filled_target_serves_even_if_its_source_died() -> None:
    assert after((S, OFF), (Y, UP)) == [O, S]


def test_one_target_is_filled_at_a_time() -> None:
    assert after((S, UP), (W, ON), (O, ON)) == [S, Y, W]
    assert after((S, UP), (Y, ON), (W, ON)) == [S, Y, W]


def test_order_and_exclusion_hold_for_every_chain_of_three() -> None:
    cells = list(itertools.product(Public, Local))
    for row in itertools.product(cells, repeat=3):
        if sum(p is L for p, _ in row) + any(p is S for p, _ in row) > 1:
            continue  # no lawful chain
        if sum(p is Y for p, _ in row) > 1:
            continue
        members = tuple(Member(i, i, p) for i, (p, _) in enumerate(row))
        new = next_members(members, {i: state for i, (_, state) in enumerate(row)})
        states = [m.public for m in new]
        assert states == sorted(states)
        assert states.count(Y) <= 1 and states.count(L) <= 1
        assert not (S in states and L in states)
        if any(p in (S, L) for p, _ in row):
            assert S in states or L in states


def test_version_rises_only_with_a_change() -> None:
    chain = Chain(1, 5, (Member(1, 1, S), Member(2, 2, S)))
    assert next_chain(chain, {1: UP, 2: UP}) is chain
    changed = next_chain(chain, {1: UP})
    assert (changed.version, changed.members[1].public) == (6, O)
    assert changed.successor(1) is None
    tail = read_tail(changed)
    assert tail is not None and tail.target == 1


def test_chains_use_every_node_equally_and_none_twice() -> None:
    placement = place_chains(5, 3, 20)
    used = [node for members in placement.values() for _, node in members]
    assert {used.count(n) for n in range(1, 6)} == {12}
    assert all(len({n for _, n in members}) == 3 for members in placement.values())
    targets = [target for members in placement.values() for target, _ in members]
    assert len(set(targets)) == len(targets)
    with pytest.raises(ConfigError, match="replicas on 2 nodes is 3, wanted"):
        place_chains(2, 3, 1)
