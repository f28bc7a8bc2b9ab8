"""Reading ahead: what comes, when, and what of an exception."""

import threading

import pytest

from fastxent.io.ahead import ahead


def test_the_next_item_is_made_while_this_one_is_used():
    made = [threading.Event() for _ in range(4)]

    def make():
        for number, event in enumerate(made):
            event.set()
            yield number

    for number in ahead(make()):
        if number < 3:
            assert made[number + 1].wait(10)
        assert not any(event.is_set() for event in made[number + 2 :])


def test_an_exception_comes_after_the_items_before_it():
    def make():
        yield 1
        raise OSError("gone")

    found = []
    with pytest.raises(OSError, match="gone"):
        found.extend(ahead(make()))
    assert found == [1]


def test_no_thread_is_left_by_one_who_stops_early():
    before = threading.active_count()
    items = ahead(iter(range(100)))
    assert next(items) == 0
    items.close()
    assert threading.active_count() == before
