from __future__ import annotations

import asyncio
import logging
from typing import cast

import pytest

from sekha.turns import ALONE_WRITES, MOST_BYTES, Turn, turn_of


class Written:
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.pieces.append(data)

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    @property
    def transport(self) -> asyncio.Transport:
        return cast(asyncio.Transport, self)


class Broken(Written):
    def write(self, data: bytes) -> None:
        raise RuntimeError("the handler is closed")


async def test_what_is_written_in_one_turn_goes_out_together_and_in_order() -> None:
    turn, one, other = turn_of(asyncio.get_running_loop()), Written(), Written()

    for piece in (b"a", b"b", b"c"):
        turn.write(one.transport, piece)
        turn.write(other.transport, piece.upper())
    before = one.pieces.copy()
    await asyncio.sleep(0)

    assert (before, one.pieces, other.pieces) == ([], [b"abc"], [b"ABC"])


async def left_alone(turn: Turn, connection: object) -> None:
    """Have one request at a time for some time."""
    turn.busy.add(connection)
    for _ in range(ALONE_WRITES):
        socket = Written()
        turn.write(socket.transport, b"a")
        turn.flush(socket.transport)
        assert socket.pieces == []
        await asyncio.sleep(0)
        assert socket.pieces == [b"a"]


async def test_who_has_been_alone_for_some_time_does_not_wait_for_the_end_of_the_turn() -> None:
    turn, socket = turn_of(asyncio.get_running_loop()), Written()
    await left_alone(turn, "one")
    called: list[list[bytes]] = []

    turn.write(socket.transport, b"head")
    turn.write(socket.transport, b" body")
    turn.flush(socket.transport)
    at_once = socket.pieces.copy()
    turn.behind(lambda: called.append(socket.pieces.copy()))
    turn.write(socket.transport, b"more")
    await asyncio.sleep(0)

    assert at_once == [b"head body"]
    assert socket.pieces == [b"head body", b"more"]
    assert called == [[b"head body", b"more"]]


async def test_who_has_company_waits_for_it_and_is_not_alone_at_once_when_it_leaves() -> None:
    turn, socket = turn_of(asyncio.get_running_loop()), Written()
    await left_alone(turn, "one")

    turn.busy.add("other")
    turn.write(socket.transport, b"a")
    turn.flush(socket.transport)
    turn.busy.discard("other")
    turn.write(socket.transport, b"b")
    turn.flush(socket.transport)
    before = socket.pieces.copy()
    await asyncio.sleep(0)

    assert (before, socket.pieces) == ([], [b"ab"])


async def test_nobody_is_taken_to_be_alone_where_nobody_says_who_is_served() -> None:
    turn = turn_of(asyncio.get_running_loop())

    for _ in range(ALONE_WRITES + 1):
        socket = Written()
        turn.write(socket.transport, b"a")
        turn.flush(socket.transport)
        assert socket.pieces == []
        await asyncio.sleep(0)


async def test_each_turn_writes_what_was_given_in_it() -> None:
    turn, socket = turn_of(asyncio.get_running_loop()), Written()

    for piece in (b"a", b"b"):
        turn.write(socket.transport, piece)
        await asyncio.sleep(0)

    assert socket.pieces == [b"a", b"b"]


async def test_what_is_left_for_behind_is_called_once_everything_is_written() -> None:
    turn, socket = turn_of(asyncio.get_running_loop()), Written()
    seen: list[list[bytes]] = []

    turn.write(socket.transport, b"an ")
    turn.behind(lambda: seen.append(socket.pieces.copy()))
    turn.write(socket.transport, b"answer")
    await asyncio.sleep(0)

    assert seen == [[b"an answer"]]


async def test_what_is_left_for_behind_is_called_where_nothing_is_written() -> None:
    turn = turn_of(asyncio.get_running_loop())
    called: list[str] = []

    turn.behind(lambda: called.append("one"))
    turn.behind(lambda: called.append("two"))
    before = called.copy()
    await asyncio.sleep(0)

    assert (before, called) == ([], ["one", "two"])


async def test_what_fails_behind_an_answer_keeps_nothing_else_from_being_done(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    turn, socket = turn_of(asyncio.get_running_loop()), Written()
    called: list[str] = []

    def fail() -> None:
        raise RuntimeError("what the caller asked")

    turn.behind(fail)
    turn.behind(lambda: called.append("counted"))
    turn.write(socket.transport, b"answer")
    await asyncio.sleep(0)

    assert (socket.pieces, called) == ([b"answer"], ["counted"])
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "what the caller asked" not in caplog.text


async def test_a_socket_is_closed_behind_what_was_written_to_it() -> None:
    turn, socket = turn_of(asyncio.get_running_loop()), Written()

    turn.write(socket.transport, b"last")
    turn.close(socket.transport)
    await asyncio.sleep(0)

    assert socket.pieces == [b"last"]
    assert socket.closed


async def test_nothing_is_written_to_a_socket_that_was_cut() -> None:
    turn, socket = turn_of(asyncio.get_running_loop()), Written()

    turn.write(socket.transport, b"late")
    socket.close()
    await asyncio.sleep(0)

    assert socket.pieces == []


async def test_a_socket_that_cannot_be_written_to_is_cut_and_the_others_are_written_to(
    caplog: pytest.LogCaptureFixture,
) -> None:
    turn, broken, sound = turn_of(asyncio.get_running_loop()), Broken(), Written()

    turn.write(broken.transport, b"a secret")
    turn.write(sound.transport, b"b")
    await asyncio.sleep(0)

    assert broken.closed
    assert sound.pieces == [b"b"]
    assert "is cut" in caplog.text
    assert "secret" not in caplog.text


async def test_a_socket_that_cannot_be_written_to_is_closed_all_the_same() -> None:
    turn, broken = turn_of(asyncio.get_running_loop()), Broken()

    turn.write(broken.transport, b"last")
    turn.close(broken.transport)

    assert broken.closed


async def test_much_is_written_at_once_behind_what_waited_so_that_its_writer_is_held_back_in_time() -> None:
    turn, socket = turn_of(asyncio.get_running_loop()), Written()
    much = b"x" * MOST_BYTES

    turn.write(socket.transport, b"head")
    turn.write(socket.transport, much)
    at_once = socket.pieces.copy()
    turn.write(socket.transport, b"tail")
    await asyncio.sleep(0)

    assert at_once == [b"head", much]
    assert socket.pieces == [b"head", much, b"tail"]


async def test_all_who_write_under_one_loop_share_its_turn() -> None:
    loop = asyncio.get_running_loop()

    assert turn_of(loop) is turn_of(loop)
