"""The number of threads: Numba's, checked by name, rule and value."""

import numba
import pytest

import fastxent


def test_it_is_numbas():
    before = fastxent.get_num_threads()
    try:
        fastxent.set_num_threads(1)
        assert numba.get_num_threads() == fastxent.get_num_threads() == 1
    finally:
        fastxent.set_num_threads(before)


@pytest.mark.parametrize("number", [0, -1, 10**6])
def test_a_number_out_of_range(number):
    with pytest.raises(ValueError, match=rf"threads must lie in \[1, \d+\]; got {number}"):
        fastxent.set_num_threads(number)


def test_not_a_number():
    with pytest.raises(TypeError, match=r"threads must be an integer, not 1\.5"):
        fastxent.set_num_threads(1.5)
