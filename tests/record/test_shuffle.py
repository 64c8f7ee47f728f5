"""The global order: a permutation, the same everywhere, resumed by any number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalefall.errors import ConfigError
from whalefall.record import GlobalShuffle, permute


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 3000), seed=st.integers(-5, 2**63), epoch=st.integers(0, 9))
def test_every_sample_comes_once(count, seed, epoch):
    assert sorted(permute(np.arange(count), count, seed, epoch)) == list(range(count))


def flat(batches):
    return [sample for batch in batches for sample in batch]


def test_positions_can_be_asked_alone_and_in_any_order():
    whole = permute(np.arange(1000), 1000, 3)
    asked = np.array([999, 0, 17])
    assert permute(asked, 1000, 3).tolist() == whole[asked].tolist()


def test_a_trillion_samples_cost_nothing():
    got = permute(np.arange(1000), 10**12, 1)
    assert len(set(got.tolist())) == 1000
    assert got.max() > 10**11


def test_the_order_looks_random():
    order = permute(np.arange(10_000), 10_000, 7)
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    followers = np.mean(np.diff(order) == 1)
    assert followers < 0.002
    fixed = np.mean(permute(np.arange(10_000), 10_000, 7) == permute(np.arange(10_000), 10_000, 8))
    assert fixed < 0.002


def test_an_order_never_changes_between_versions():
    assert permute(np.arange(8), 8, 42, 1).tolist() == [1, 7, 2, 4, 0, 5, 3, 6]


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 200),
    batch=st.integers(1, 7),
    before=st.integers(1, 5),
    after=st.integers(1, 5),
    steps=st.integers(0, 10),
)
def test_ranks_resume_exactly_with_another_number_of_ranks(count, batch, before, after, steps):
    shuffle = GlobalShuffle(count, seed=1)
    seen = []
    for rank in range(before):
        seen += flat(list(shuffle.batches(batch, rank, before))[:steps])
    shuffle.advance(steps, batch, before)
    resumed = GlobalShuffle.from_state(shuffle.state_dict(), count)
    for rank in range(after):
        seen += flat(resumed.batches(batch, rank, after))
    assert sorted(seen) == list(range(count))


def test_ranks_have_equally_many_batches_and_drop_last_drops_the_ragged_step():
    shuffle = GlobalShuffle(100)
    for drop, steps in ((False, 9), (True, 8)):
        ranks = [shuffle.batches(4, rank, 3, drop) for rank in range(3)]
        assert [len(r) for r in ranks] == [len(list(r)) for r in ranks] == [steps] * 3
    assert all(len(b) == 4 for b in shuffle.batches(4, 0, 3, True))


def test_epochs_differ():
    shuffle = GlobalShuffle(50)
    first = flat(shuffle.batches(50))
    shuffle.advance(1, 50)
    shuffle.next_epoch()
    assert flat(shuffle.batches(50)) != first


def test_wrong_arguments_are_refused():
    with pytest.raises(ConfigError, match="data set has 6"):
        GlobalShuffle.from_state(GlobalShuffle(5).state_dict(), 6)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        GlobalShuffle(5).batches(1, 2, 2)
    with pytest.raises(ConfigError, match="consumed"):
        GlobalShuffle(5, consumed=6)
    with pytest.raises(ConfigError, match="wanted 0 … 4"):
        permute(np.array([5]), 5, 0)
