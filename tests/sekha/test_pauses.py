from __future__ import annotations

from sekha.pauses import Pauses


class Clock:
    def __init__(self) -> None:
        self.seconds = 50.0

    def __call__(self) -> float:
        return self.seconds


def test_a_model_is_left_alone_until_its_time_is_over_and_no_other_is() -> None:
    clock = Clock()
    pauses = Pauses(clock=clock)
    pauses.note("a/m", 10)
    clock.seconds += 4

    assert (pauses.wait("a/m"), pauses.wait("a/n")) == (6, 0)
    assert pauses.now() == {"a/m": 6}
    clock.seconds += 6
    assert pauses.wait("a/m") == 0
    assert pauses.now() == {}


def test_a_shorter_word_does_not_take_back_a_longer_one() -> None:
    pauses = Pauses(clock=Clock())
    pauses.note("a/m", 10)
    pauses.note("a/m", 1)

    assert pauses.wait("a/m") == 10
