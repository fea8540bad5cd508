import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import UsageError
from qtool.scheme import QuantScheme, portable_group_size


@given(st.integers(2, 8), st.one_of(st.none(), st.integers(1, 4096)), st.booleans())
def test_text_and_fields_round_trip(bits: int, group_size: int | None, symmetric: bool) -> None:
    scheme = QuantScheme(bits, group_size, symmetric)
    assert QuantScheme.parse(str(scheme)) == scheme


def test_the_word_reads_as_documented() -> None:
    assert str(QuantScheme(4, 128)) == "int4-g128-sym"
    assert str(QuantScheme(8, None, symmetric=False)) == "int8-row-asym"


@pytest.mark.parametrize("text", ["int4", "int9-g128-sym", "int4-g0-sym", "int4-g128", ""])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        QuantScheme.parse(text)


def test_an_indivisible_row_is_refused_with_what_would_divide_it() -> None:
    with pytest.raises(UsageError, match="172 inputs are not a multiple of group size 32") as error:
        QuantScheme(4, 32).num_groups(172)
    assert error.value.hint is not None
    assert "43, 86, 172" in error.value.hint


@pytest.mark.parametrize(
    ("width", "size"), [(4096, 128), (192, 64), (96, 32), (172, None), (64, 64)]
)
def test_the_largest_portable_group_that_divides_is_chosen(width: int, size: int | None) -> None:
    assert portable_group_size(width) == size


def test_bits_per_weight_count_scales_and_zeros() -> None:
    assert QuantScheme(4, 128).bits_per_weight(1024) == 4.125
    assert QuantScheme(4, 32, symmetric=False).bits_per_weight(1024) == 4 + 20 / 32
    assert QuantScheme(8, None).bits_per_weight(256) == 8 + 16 / 256
