"""What was put into an outbox comes out of it, whoever dies and wherever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekha.outbox import Claim, Item, Outbox
from sekha.segments import ready_in

ROOM = 1 << 20

heads = st.binary().map(lambda data: data.translate(None, b"\0\n"))
attachments = st.binary().map(lambda data: data.translate(None, b"\0"))
items = st.builds(Item, heads, attachments)


def waiting(outbox: Outbox) -> list[Item]:
    return [item for path in outbox.ready() for item in outbox.read(path).items]


@given(st.lists(items, min_size=1))
def test_items_come_out_as_they_were_put(put: list[Item]) -> None:
    with TemporaryDirectory() as folder:
        outbox = Outbox(Path(folder), max_bytes=ROOM)
        for item in put:
            outbox.put(item)
        before = waiting(outbox)
        outbox.hand_over()

        assert before == []
        assert waiting(outbox) == put


@given(st.lists(items, min_size=1, max_size=5), st.data())
def test_wherever_a_segment_is_torn_what_came_before_is_whole(put: list[Item], data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        outbox = Outbox(Path(folder), max_bytes=ROOM)
        ends = []
        for item in put:
            outbox.put(item)
            ends.append(outbox.used)
        outbox.hand_over()
        [path] = outbox.ready()
        at = data.draw(st.integers(0, ends[-1]))
        os.truncate(path, at)

        parcel = outbox.read(path)

        # A line that lacks nothing but its newline is whole.
        whole = sum(end - 1 <= at for end in ends)
        assert parcel.items == tuple(put[:whole])
        assert parcel.torn == (at > (ends[whole - 1] if whole else 0))


@given(st.lists(items, min_size=1, max_size=3), st.data())
def test_a_head_that_was_changed_never_comes_out(put: list[Item], data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        outbox = Outbox(Path(folder), max_bytes=ROOM)
        outbox.put_apart(put)
        [path] = outbox.ready()
        written = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(written) - 1))
        written[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(written)

        found = {item.head for item in outbox.read(path).items}

        assert found <= {item.head for item in put}


PUTS = """
import sys
from pathlib import Path
from sekha.outbox import Claim, Item, Outbox
outbox = Outbox(Path(sys.argv[1]), max_bytes=1 << 20)
outbox.put(Item(b"{}", b"attached"))
assert Claim(Path(sys.argv[1])).held()
print("put", flush=True)
import signal; signal.pause()
"""


def test_what_a_killed_process_put_comes_out_and_its_claim_passes_on(tmp_path: Path) -> None:
    outbox, claim = Outbox(tmp_path, max_bytes=ROOM), Claim(tmp_path)
    process = subprocess.Popen([sys.executable, "-P", "-c", PUTS, str(tmp_path)], stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"put\n"
        while_it_lived = (waiting(outbox), claim.held())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    assert while_it_lived == ([], False)
    assert waiting(outbox) == [Item(b"{}", b"attached")]
    assert claim.held()


def test_a_claim_that_was_let_go_may_be_taken(tmp_path: Path) -> None:
    first, second = Claim(tmp_path), Claim(tmp_path)

    assert first.held()
    assert first.held()
    assert not second.held()
    first.let_go()
    assert second.held()
    second.let_go()


def test_an_outbox_that_is_full_takes_nothing_until_something_is_done(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, max_bytes=100)
    outbox.put(Item(b"x" * 60))

    with pytest.raises(OSError, match="wait already"):
        outbox.put(Item(b"x" * 60))
    with pytest.raises(OSError, match="wait already"):
        outbox.put_apart([Item(b"x" * 60)])

    outbox.hand_over()
    outbox.done(outbox.ready()[0])
    outbox.look()
    outbox.put(Item(b"x" * 60))
    outbox.hand_over()
    assert len(waiting(outbox)) == 1


def test_what_is_left_of_a_segment_takes_its_place(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, max_bytes=ROOM)
    outbox.put_apart([Item(b"1"), Item(b"2", b"two\nlines"), Item(b"3")])
    [path] = outbox.ready()
    outbox.put_apart([Item(b"2", b"two\nlines")], over=path)

    assert ready_in(tmp_path) == [path]
    assert waiting(outbox) == [Item(b"2", b"two\nlines")]
