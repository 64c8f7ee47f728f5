"""Checks of plain arguments that all rooms share: what they take, and how they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from whalefall.arguments import finite, flag, shown, whole, wholes
from whalefall.errors import ConfigError, DtypeError

NO_NUMBERS: list[Any] = [None, "3", b"3", [], {}, 1j, object(), np.ones(3), torch.ones(2)]


def refusal(check: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        check("f: x", *args, **kwargs)
    text = str(refused.value)
    assert text.startswith("f: x")
    assert " is " in text and ", wanted " in text and "\n" not in text
    return text


@pytest.mark.parametrize("given", [3, np.int64(3), np.uint8(3)])
def test_a_whole_number_is_an_int_of_python(given: Any) -> None:
    assert whole("f: x", given) == 3
    assert type(whole("f: x", given, 3, 3)) is int


@pytest.mark.parametrize(
    "given",
    [
        *NO_NUMBERS,
        True,
        np.True_,
        2.0,
        np.float32(2),
        np.array(2),
        torch.tensor(2),
        np.ones(1, int),
    ],
)
def test_what_is_no_whole_number_is_refused(given: Any) -> None:
    assert (
        refusal(whole, given) == f"f: x is {shown(given)}, wanted a whole number; pass such an int"
    )


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ((4,), "a whole number >= 4"),
        ((None, 2), "a whole number <= 2"),
        ((4, 9), "a whole number from 4 to 9"),
        ((0, 2), "a whole number from 0 to 2"),
    ],
)
def test_a_whole_number_out_of_its_limits_is_told_them(
    limits: tuple[Any, ...], wanted: str
) -> None:
    assert refusal(whole, 3, *limits) == f"f: x is 3, wanted {wanted}; pass such an int"


def test_a_room_says_which_error_it_wants() -> None:
    with pytest.raises(DtypeError, match=r"^f: x is '3', wanted a whole number; pass such an int$"):
        whole("f: x", "3", error=DtypeError)


@pytest.mark.parametrize(
    "given", [[1, 2], (1, 2), np.array([1, 2]), torch.tensor([1, 2]), range(1, 3)]
)
def test_several_whole_numbers_come_in_any_sequence(given: Any) -> None:
    assert wholes("f: x", given, 1) == [1, 2]
    assert "f: x[0] is 1, wanted a whole number >= 2" in refusal(wholes, given, 2)


@pytest.mark.parametrize("given", [3, None, np.array(3), torch.empty(2, device="meta"), object()])
def test_what_is_no_sequence_of_whole_numbers_is_refused(given: Any) -> None:
    assert (
        refusal(wholes, given)
        == f"f: x is {shown(given)}, wanted whole numbers; pass a list of ints"
    )


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *((True, True), (False, False), (None, False), (0, False), (2, True)),
        *((np.True_, True), (np.int8(0), False), (np.array([True]), True)),
        *((torch.tensor(False), False), (torch.ones(1, dtype=torch.bool), True)),
    ],
)
def test_a_flag_is_what_has_one_truth_value(given: Any, meant: bool) -> None:
    assert flag("f: x", given) is meant


@pytest.mark.parametrize(
    "given",
    [
        *("no", b"", [], {}, 1.5, float("nan"), object(), np.ones(1), np.zeros(2, bool)),
        *(torch.ones(2, dtype=torch.bool), torch.ones(1, dtype=torch.bool, device="meta")),
    ],
)
def test_what_has_no_one_truth_value_is_no_flag(given: Any) -> None:
    assert refusal(flag, given) == f"f: x is {shown(given)}, wanted True or False; pass a bool"


@pytest.mark.parametrize("given", [2, 2.0, np.float32(2), np.int64(2)])
def test_a_finite_number_is_a_float_of_python(given: Any) -> None:
    assert finite("f: x", given, 2, 2) == 2.0
    assert type(finite("f: x", given)) is float


@pytest.mark.parametrize(
    "given", [*NO_NUMBERS, True, float("nan"), float("inf"), -np.inf, 10**400, torch.tensor(2.0)]
)
def test_what_is_no_finite_number_is_refused(given: Any) -> None:
    assert refusal(finite, given) == f"f: x is {shown(given)}, wanted a finite number"


@pytest.mark.parametrize(
    ("given", "limits", "above", "wanted"),
    [
        (0, (0,), True, "a finite number above 0"),
        (-1, (0,), False, "a finite number >= 0"),
        (0, (0, 1e9), True, "above 0 to 1e+09"),
        (1.5, (0, 1), False, "0 to 1"),
        (float("nan"), (0, 1), False, "0 to 1"),
    ],
)
def test_a_finite_number_out_of_its_limits_is_told_them(
    given: float, limits: tuple[float, ...], above: bool, wanted: str
) -> None:
    assert refusal(finite, given, *limits, above=above) == f"f: x is {given}, wanted {wanted}"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        *((None, "None"), ("a\nb", r"'a\nb'"), (1.5, "1.5"), ((1, "x"), "(1, 'x')"), ([], "[]")),
        *((np.float32, "the type float32"), (object(), "a object"), (print, "a builtin_function_")),
        (np.ones((2, 3), np.float32), "a float32 array [2, 3]"),
        (torch.ones(2, device="meta"), "a torch.float32 array [2]"),
        (torch.ones(2, 3).to_sparse(), "a torch.float32 array [2, 3]"),
        (np.ones((), np.int32), "a int32 array []"),
        (1 << 70, "1180591620717411303424"),
        (1 << 70_000, "a number of 70001 bits"),
        ([1 << 70_000], "a list"),
        (list(range(50)), "a list of 50"),
        (["y" * 80], "['yyyy"),
        ("x" * 10_000, "'xxxx"),
    ],
    ids=lambda given: type(given).__name__,  # pytest would write all digits
)
def test_a_value_is_shown_in_one_short_line(given: Any, text: str) -> None:
    found = shown(given)
    assert found.startswith(text)
    assert len(found) <= 60 and "\n" not in found
