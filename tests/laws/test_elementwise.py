"""Masks in many spellings are shown to be one; masks that differ somewhere are not."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import sympy
import torch

from cachefree.align import Comparison, compare
from cachefree.facts import Facts
from cachefree.laws.elementwise import ELEMENTWISE, ELEMENTWISE_REAL, ELEMENTWISE_SIGNLESS
from cachefree.sizes import size_symbol
from cachefree.terms import Table

from .equations import Instance, drawn, program, same_bits, value

Mask = Callable[..., torch.Tensor]
NEW, PAST = size_symbol("n"), size_symbol("p")
INPUTS = ("n", "p")
SIZES = [(1, 0), (1, 1), (1, 5), (2, 0), (3, 1), (4, 4), (5, 2)]


def compared(
    one: Mask, other: Mask, inputs: tuple[str, ...] = INPUTS, above: int = 1
) -> Comparison:
    """How two functions of tensors compare, as values of their sizes and elements."""
    table = Table()
    left, right = program(inputs, one, table), program(inputs, other, table)
    return compare(table, left, right, Facts([sympy.Ge(NEW, above)]))


def is_proved(one: Mask, other: Mask, inputs: tuple[str, ...] = INPUTS) -> bool:
    """Whether they are shown to be equal for every size: by laws, not by trying sizes."""
    comparison = compared(one, other, inputs)
    return comparison.is_equal and not comparison.checked


def sizes_of(x: torch.Tensor, y: torch.Tensor) -> tuple[int, int, int]:
    return x.shape[0], y.shape[0], x.shape[0] + y.shape[0]


def lower_triangle(x, y):
    n, p, m = sizes_of(x, y)
    return torch.ones(n, m, dtype=torch.bool).tril(p)


def no_upper_triangle(x, y):
    n, p, m = sizes_of(x, y)
    return ~torch.ones(n, m).triu(p + 1).bool()


def positions_compared(x, y):
    _n, p, m = sizes_of(x, y)
    return torch.arange(m)[None, :] <= torch.arange(p, m)[:, None]


def distance(x, y):
    n, p, m = sizes_of(x, y)
    return torch.arange(n).view(-1, 1) + p - torch.arange(m).view(1, -1) >= 0


def rows_of_a_square(x, y):
    _n, p, m = sizes_of(x, y)
    return torch.tril(torch.ones(m, m))[p:, :] == 1


def seen_beside_a_triangle(x, y):
    n, p, _m = sizes_of(x, y)
    return torch.cat((torch.ones(n, p), torch.ones(n, n).tril()), dim=1).bool()


def filled_where_later(x, y):
    n, p, m = sizes_of(x, y)
    mask = torch.ones(n, m, dtype=torch.bool)
    return mask.masked_fill(torch.arange(m) > torch.arange(p, m).unsqueeze(-1), False)


def written_beside_the_past(x, y):
    n, p, m = sizes_of(x, y)
    mask = torch.ones(n, m, dtype=torch.bool)
    mask[:, p:] = torch.ones(n, n, dtype=torch.bool).tril()
    return mask


CAUSAL = (
    lower_triangle,
    no_upper_triangle,
    positions_compared,
    distance,
    rows_of_a_square,
    seen_beside_a_triangle,
    filled_where_later,
    written_beside_the_past,
)


def diagonal_before(x, y):
    n, p, m = sizes_of(x, y)
    return torch.ones(n, m, dtype=torch.bool).tril(p - 1)


def diagonal_after(x, y):
    n, p, m = sizes_of(x, y)
    return torch.ones(n, m, dtype=torch.bool).tril(p + 1)


def past_is_forgotten(x, y):
    n, _p, m = sizes_of(x, y)
    return torch.ones(n, m, dtype=torch.bool).tril()


def transposed_roles(x, y):
    _n, p, m = sizes_of(x, y)
    return torch.arange(m)[None, :] >= torch.arange(p, m)[:, None]


def everything(x, y):
    n, _p, m = sizes_of(x, y)
    return torch.ones(n, m, dtype=torch.bool)


def but_the_first(x, y):
    n, _p, m = sizes_of(x, y)
    mask = lower_triangle(x, y)
    return mask & ((torch.arange(m) > 0) | (torch.arange(n)[:, None] < 17))


WRONG = (
    diagonal_before,
    diagonal_after,
    past_is_forgotten,
    transposed_roles,
    everything,
    but_the_first,
)


def windowed(width: int, *, strict: bool = True) -> Mask:
    def mask(x, y):
        _n, p, m = sizes_of(x, y)
        lag = torch.arange(p, m)[:, None] - torch.arange(m)
        return (lag >= 0) & (lag < width if strict else lag <= width)

    return mask


def banded(width: int) -> Mask:
    def mask(x, y):
        n, p, m = sizes_of(x, y)
        band = torch.ones(n, m, dtype=torch.bool).tril(p)
        return band.logical_and(torch.ones(n, m, dtype=torch.bool).triu(p - width + 1))

    return mask


def value_of(mask: Mask, new: int, past: int) -> torch.Tensor:
    return mask(torch.zeros(new), torch.zeros(past))


@pytest.mark.parametrize(
    ("one", "other"), list(itertools.combinations(CAUSAL, 2)), ids=lambda mask: mask.__name__
)
def test_causal_masks_in_all_spellings_are_one(one: Mask, other: Mask) -> None:
    for new, past in SIZES:
        assert torch.equal(value_of(one, new, past), value_of(other, new, past))
    comparison = compared(one, other)
    assert comparison.is_equal
    assert not comparison.checked, "compared at many sizes only"
    assert comparison.is_exact


@pytest.mark.parametrize("wrong", WRONG, ids=lambda mask: mask.__name__)
@pytest.mark.parametrize(
    "right",
    [CAUSAL[0], *(pytest.param(mask, marks=pytest.mark.slow) for mask in CAUSAL[1:5])],
    ids=lambda mask: mask.__name__,
)
def test_no_wrong_mask_is_proved(right: Mask, wrong: Mask) -> None:
    comparison = compared(right, wrong)
    assert not comparison.is_equal or comparison.checked, "proved, though they differ"
    if wrong is not but_the_first:  # that one differs from 18 tokens on only, in one column
        assert not comparison.is_equal


def test_windows_of_one_width_are_one_and_of_another_are_not() -> None:
    for width in (1, 3, 8):
        assert is_proved(windowed(width), banded(width))
        assert is_proved(windowed(width), windowed(width - 1, strict=False))
        assert not compared(windowed(width), banded(width + 1)).is_equal
        assert not compared(windowed(width), windowed(width, strict=False)).is_equal


def additive(make: str) -> Mask:
    def mask(x, y):
        n, p, m = sizes_of(x, y)
        if make == "filled":
            return torch.zeros(n, m).masked_fill(~lower_triangle(x, y), float("-inf"))
        if make == "chosen":
            return torch.where(positions_compared(x, y), 0.0, float("-inf"))
        if make == "triangle":
            return torch.full((n, m), float("-inf")).triu(p + 1)
        if make == "finite":
            return torch.where(distance(x, y), 0.0, torch.finfo(torch.float32).min)
        return torch.where(distance(x, y), -0.0, float("-inf"))

    return mask


def test_numbers_are_compared_in_the_dtype_of_the_tensor() -> None:
    def filled(x, y):
        return torch.where(lower_triangle(x, y), 0.1, 1.0)

    assert is_proved(lambda x, y: filled(x, y) == 0.1, lower_triangle)
    assert not compared(lambda x, y: filled(x, y) == 0.1, lambda x, y: ~everything(x, y)).is_equal
    assert is_proved(lambda x, y: filled(x, y).half() >= 0.1, everything)


def test_additive_masks() -> None:
    same = [additive(name) for name in ("filled", "chosen", "triangle")]
    for one, other in itertools.combinations(same, 2):
        assert is_proved(one, other)
        assert not compared(one, additive("finite")).is_equal
        assert not compared(one, additive("negative zero")).is_equal, "−0.0 is not 0.0"


def test_the_sign_of_a_zero_counts_where_something_tells_it() -> None:
    one, other = additive("filled"), additive("negative zero")
    hidden = [
        lambda x, y, mask=mask: torch.softmax(x.sum() + mask(x, y), -1) for mask in (one, other)
    ]
    comparison = compared(*hidden)
    assert comparison.is_equal
    assert ELEMENTWISE_SIGNLESS in comparison.laws
    assert not comparison.checked
    for told in (lambda mask: 1 / mask, torch.signbit, lambda mask: mask.expand(2, *mask.shape)):
        apart = [lambda x, y, mask=mask: told(mask(x, y)) for mask in (one, other)]  # noqa: B023
        assert not compared(*apart).is_equal


def test_elements_of_other_tensors() -> None:
    inputs = ("n n", "p")

    def triangle_of(x, y):
        return x.tril()

    def chosen_from(x, y):
        n = x.shape[0]
        return torch.where(torch.arange(n) <= torch.arange(n)[:, None], x, 0.0)

    def transposed(x, y):
        return x.t().tril()

    assert is_proved(triangle_of, chosen_from, inputs)
    assert not compared(triangle_of, transposed, inputs).is_equal
    assert not compared(triangle_of, lambda x, y: x.tril(1), inputs).is_equal


def test_a_sum_with_zero_is_real_and_not_exact() -> None:
    def plain(x, y):
        return torch.where(lower_triangle(x, y), torch.arange(sizes_of(x, y)[2]) * 0.5, 1.0)

    def with_zero(x, y):
        return plain(x, y) + torch.where(everything(x, y), 0.0, 1.0)

    comparison = compared(plain, with_zero)
    assert comparison.is_equal
    comparison = compared(lambda x, y: x.tril(), lambda x, y: x.tril() + torch.where(
        torch.ones_like(x, dtype=torch.bool), 0.0, 1.0), ("n n", "p"))  # fmt: skip
    assert comparison.is_equal
    assert not comparison.is_exact


NARROWED = [
    (torch.int64, lambda x: x.int().long(), lambda x: x),
    (torch.int64, lambda x: x.to(torch.int8).long(), lambda x: x),
    (torch.int64, lambda x: x.float().long(), lambda x: x),
    (torch.float32, lambda x: x.half().float(), lambda x: x),
    (torch.float16, lambda x: x * 0.1, lambda x: x * torch.full((), 0.1, dtype=torch.float16)),
    (torch.float32, lambda x: x * 0.1 * 10.0, lambda x: x * (0.1 * 10.0)),
    (torch.float32, lambda x: (x + 1.0) - 1.0, lambda x: x),
    (torch.float32, lambda x: x * 0.0, lambda x: torch.zeros_like(x)),
    (torch.float32, lambda x: x - x, lambda x: torch.zeros_like(x)),
    (torch.float32, lambda x: x.neg().neg() + 0.0, lambda x: x),
    (torch.float32, lambda x: torch.where(x == x, x, 0.0), lambda x: x),
    (torch.int64, lambda x: x.clamp(0, 9), lambda x: x.clamp(0, 8)),
]


@pytest.mark.parametrize(("dtype", "one", "other"), NARROWED)
def test_what_rounds_is_not_proved_exact(dtype: torch.dtype, one: Mask, other: Mask) -> None:
    text = f"n:{str(dtype).removeprefix('torch.')}"

    def masked(function: Mask) -> Mask:
        """Inside a choice by position, so that the elementwise prover looks at it."""

        def chosen(x):
            kept = torch.arange(x.shape[0]) >= 1
            return torch.where(kept, function(x), torch.ones_like(function(x)))

        return chosen

    comparison = compared(masked(one), masked(other), (text,))
    assert not comparison.is_equal or not comparison.is_exact or comparison.checked


def wrapped(dtype: torch.dtype, threshold: int) -> Mask:
    def mask(x, y):
        positions = torch.arange(sizes_of(x, y)[2], dtype=dtype)
        return (positions - 3).long() > threshold

    return mask


def nothing(x, y):
    return torch.zeros(sizes_of(x, y)[2], dtype=torch.bool)


def bytes_of(x, number):
    return torch.full((x.shape[0],), number, dtype=torch.uint8)


WRAPPED = [
    (wrapped(torch.uint8, 200), nothing),
    (wrapped(torch.int8, 4), wrapped(torch.int64, 4)),
    (
        lambda x, y: torch.arange(x.shape[0], dtype=torch.int8) < 200,
        lambda x, y: torch.ones(x.shape[0], dtype=torch.bool),
    ),
    (
        lambda x, y: torch.arange(x.shape[0], dtype=torch.uint8).neg().long() <= 0,
        lambda x, y: torch.ones(x.shape[0], dtype=torch.bool),
    ),
    (
        lambda x, y: torch.arange(x.shape[0], dtype=torch.uint8) == -1,
        lambda x, y: torch.zeros(x.shape[0], dtype=torch.bool),
    ),
    (
        lambda x, y: (bytes_of(x, 200) + bytes_of(x, 100)).long() > 255,
        lambda x, y: torch.ones(x.shape[0], dtype=torch.bool),
    ),
    (
        lambda x, y: (bytes_of(x, 16) * bytes_of(x, 16)).bool(),
        lambda x, y: torch.ones(x.shape[0], dtype=torch.bool),
    ),
    (
        lambda x, y: (bytes_of(x, 1) - bytes_of(x, 2)).long() < 0,
        lambda x, y: torch.ones(x.shape[0], dtype=torch.bool),
    ),
    (
        lambda x, y: torch.rsub(torch.arange(x.shape[0]), 7, alpha=2),
        lambda x, y: 7 - torch.arange(x.shape[0]),
    ),
    (
        lambda x, y: torch.div(torch.arange(x.shape[0]) - 4, 3, rounding_mode="trunc"),
        lambda x, y: torch.div(torch.arange(x.shape[0]) - 4, 3, rounding_mode="floor"),
    ),
    (
        lambda x, y: (torch.arange(x.shape[0]) - 4) % 3,
        lambda x, y: (torch.arange(x.shape[0]) - 4).fmod(3),
    ),
]


@pytest.mark.parametrize(("one", "other"), WRAPPED)
def test_integers_that_wrap_or_round_are_not_taken_for_others(one: Mask, other: Mask) -> None:
    assert not is_proved(one, other)


def test_small_integers_that_stay_small_are_numbers() -> None:
    def added(x, y):
        n, p, m = sizes_of(x, y)
        ones = torch.ones(n, m, dtype=torch.uint8)
        return (ones.triu(p + 1) + ones.tril(p - 3)).bool()

    def of_a_window(x, y):
        _n, p, m = sizes_of(x, y)
        query, key = torch.arange(p, m)[:, None], torch.arange(m)
        return (key > query) | (key <= query - 3)

    assert is_proved(added, of_a_window)
    assert is_proved(
        lambda x, y: (bytes_of(x, 155) + bytes_of(x, 100)).long() == 255,
        lambda x, y: torch.ones(x.shape[0], dtype=torch.bool),
    )


def test_products_of_32_bits_are_not_those_of_64() -> None:
    def narrow(x):
        return torch.where(torch.arange(x.shape[0]) >= 1, (x * x).long(), 0)

    def wide(x):
        return torch.where(torch.arange(x.shape[0]) >= 1, x.long() * x.long(), 0)

    assert not compared(narrow, wide, ("n:int32",)).is_equal
    assert compared(wide, wide, ("n:int32",)).is_equal


def test_truth_values_in_order() -> None:
    def less(x, y):
        return (torch.arange(x.shape[0]) > 2) < (torch.arange(x.shape[0]) > 1)

    def only(x, y):
        return torch.arange(x.shape[0]) == 2

    assert is_proved(less, only)


def test_a_row_left_out_of_the_gradient_is_another_embedding() -> None:
    def padded(x, y):
        return torch.nn.functional.embedding(torch.arange(x.shape[0]), y, padding_idx=0)

    def plain(x, y):
        return torch.nn.functional.embedding(torch.arange(x.shape[0]), y)

    assert not compared(padded, plain, ("n", "p 4")).is_equal


def test_the_two_laws_say_what_they_are() -> None:
    assert ELEMENTWISE.kind == "exact"
    assert ELEMENTWISE_REAL.kind == "real"
    comparison = compared(lower_triangle, positions_compared)
    assert ELEMENTWISE in comparison.laws


def test_terms_evaluate_to_what_torch_gives() -> None:
    """The terms that are compared are those of the masks: the evaluation is torch's."""
    for mask in (*CAUSAL, *WRONG):
        lines = Instance(mask.__name__, INPUTS, mask)
        table = Table()
        (term,) = program(INPUTS, mask, table)
        for new, past in SIZES:
            sizes = {NEW: new, PAST: past}
            found = value(term, drawn(lines, sizes), sizes)
            assert same_bits(found, value_of(mask, new, past)), mask.__name__
