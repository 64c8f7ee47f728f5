"""`assert_close` says what is off; `run_ranks` runs ranks."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from whalefall import ep, testing
from whalefall.errors import ConfigError, RankFailure
from whalefall.testing import assert_close, run_ranks


def test_the_public_names_are_there() -> None:
    for name in testing.__all__:
        assert getattr(testing, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        testing.nothing  # noqa: B018


def test_close_arrays_pass_and_far_ones_are_named() -> None:
    want = np.array([[1.0, 2.0], [3.0, np.inf]])
    assert_close(want * (1 + 1e-7), want, 1e-9)
    assert_close(np.zeros((0, 3)), np.zeros((0, 3)), 0.0)
    with pytest.raises(AssertionError, match=r"mine: diff is .* at most 1e-06; worst at \[1, 0\]"):
        assert_close([[1.0, 2.0], [4.0, np.inf]], want, 1e-6, "mine")
    with pytest.raises(AssertionError, match=r"shape is \[2\], wanted \[2, 2\]"):
        assert_close([1.0, 2.0], want, 1.0)
    for bad in (np.nan, np.inf):
        with pytest.raises(AssertionError, match=r"at \[0, 1\] is (nan|inf), wanted 2\.0"):
            assert_close([[1.0, bad], [3.0, np.inf]], want, 1.0)


def meet(rank: int, size: int, folder: str, word: str) -> list[str]:
    group = ep.FileGroup(folder, rank, size)
    return [m.decode() for m in group.all_gather(f"{word} {rank}".encode())]


def fail(rank: int, size: int, folder: str) -> None:
    if rank == 1:
        raise ValueError("rank 1 has had enough")
    signal.pause()


def test_ranks_meet_in_their_folder() -> None:
    assert run_ranks(meet, 3, "hello") == [["hello 0", "hello 1", "hello 2"]] * 3


def test_a_failing_rank_ends_the_others_and_is_named() -> None:
    with pytest.raises(RankFailure, match="rank 1 has had enough"):
        run_ranks(fail, 2, timeout_s=60)


def test_a_function_no_process_can_find_is_refused() -> None:
    with pytest.raises(ConfigError, match="no function at the top of a module"):
        run_ranks(lambda rank, size, folder: None, 1)


def test_run_ranks_wants_a_rank() -> None:
    with pytest.raises(ConfigError, match="run_ranks: size is 0, wanted a whole number >= 1"):
        run_ranks(meet, 0, "hello")
