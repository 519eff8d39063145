import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekha.providers.events import EventSplitter, texts_in
from sekha.providers.http import BadResponse

LINES = st.sampled_from([b"data: a", b"data: {}", b": a comment", b"event: x", b"data:", b"id: 1"])
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
STREAMS = st.lists(st.tuples(st.lists(LINES, min_size=1, max_size=3), ENDS), min_size=1, max_size=6)


def written(stream: list[tuple[list[bytes], bytes]]) -> bytes:
    return b"".join(end.join(lines) + end + end for lines, end in stream)


def split(pieces: list[bytes]) -> list[bytes]:
    splitter = EventSplitter()
    blocks = [splitter.feed(piece) for piece in pieces]
    assert all(block == b"" or block.endswith(b"\n\n") for block in blocks)
    return [event.strip(b"\n") for block in blocks for event in block.split(b"\n\n") if event.strip(b"\n")]


@given(stream=STREAMS, data=st.data())
def test_events_are_the_same_whatever_pieces_they_come_in(stream: list[tuple[list[bytes], bytes]], data) -> None:
    whole = written(stream)
    cuts = sorted(data.draw(st.sets(st.integers(min_value=1, max_value=len(whole) - 1))))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]

    assert split(pieces) == [b"\n".join(lines) for lines, _ in stream]


def test_an_event_is_held_until_it_is_whole() -> None:
    splitter = EventSplitter()

    assert splitter.feed(b"data: 1\n\ndata: 2") == b"data: 1\n\n"
    assert splitter.feed(b"\n") == b""
    assert splitter.feed(b"\ndata: 3\n\n") == b"data: 2\n\ndata: 3\n\n"


@pytest.mark.parametrize(
    ("left", "event"),
    [
        (b"data: [DONE]", b"data: [DONE]\n\n"),
        (b"data: [DONE]\n", b"data: [DONE]\n\n"),
        (b'data: {"a": 1}\n', b'data: {"a": 1}\n\n'),
        (b'data: {"a": 1', b""),
        (b": a comment\n", b""),
        (b"", b""),
    ],
)
def test_the_last_event_may_lack_its_blank_line_where_it_is_whole(left: bytes, event: bytes) -> None:
    splitter = EventSplitter()
    splitter.feed(b"data: 1\n\n" + left)

    assert splitter.rest() == event


def test_an_event_without_end_is_not_gathered_for_ever() -> None:
    splitter = EventSplitter()
    for _ in range(8):
        splitter.feed(b"x" * 1_000_000)

    with pytest.raises(BadResponse, match="one event of it is longer than 8,388,608 bytes"):
        splitter.feed(b"x" * 1_000_000)


def test_texts_are_those_of_every_choice_with_thoughts_and_calls_of_tools() -> None:
    block = (
        b'data: {"choices":[{"delta":{"content":"a"}},{"delta":{"reasoning_content":"b"}}]}\n\n'
        b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"name":"c","arguments":"{}"}},null]}},7]}\n\n'
        b'data: not JSON\n\ndata: {"choices":null}\n\ndata: {"choices":[{"delta":null}]}\n\n: comment\n\n'
    )

    assert texts_in([block]) == ["a", "b", "c{}"]
