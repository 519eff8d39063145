"""A journal: what it keeps when its process is killed, the power fails or the disk is full."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from itertools import count
from pathlib import Path
from threading import Event

import pytest

from sekha.errors import LedgerError, LedgerUnavailable
from sekha.ledger import Scope, Spend
from sekha.ledgers.encoding import picos
from sekha.ledgers.journal import Journal, abandoned, scope_record, spend_record
from sekha.pricing import Usage
from tests.fixtures.full import room_for

ROOT = Path(__file__).parents[2]
SCOPE = scope_record(Scope(provider="openai", model="openai/m", key="research"))
SPEND = Spend(
    scope=Scope(), cost=Decimal(0), estimated=Decimal(0), usage=Usage(), at=datetime(2026, 11, 23, 14, 30, tzinfo=UTC)
)
PAGE = 4096
UNFINISHED = "has a line that was never finished"


def record(cost: int, *, length: int = 0) -> tuple[object, ...]:
    """A spend, whose hold goes by a name of this length."""
    return spend_record("c", "-" * length, SPEND, SCOPE, cost, cost)


def line(cost: int) -> bytes:
    """A spend as it is written."""
    scope = "[null,null,null,null]"
    written = f'["c","hold","{cost}","2026-11-23T14:30:00+00:00",{scope},{cost},{cost},0,0,0,0,0,false]'.encode()
    return b"%08x %b\n" % (zlib.crc32(written), written)


def segment(folder: Path) -> Path:
    """The only one that there is."""
    [path] = folder.glob("*.journal")
    return path


def recovered(folder: Path) -> list[int]:
    """What is found in the one journal of a dead process: what each spend cost, in their order."""
    [found] = abandoned(folder)
    found.close()
    assert [number for number, _ in found.spends] == list(range(1, len(found.spends) + 1))
    return [picos(each.cost) for _, each in found.spends]


def left_behind(folder: Path, written: bytes, *, version: int = 2) -> Path:
    """A journal whose owner was killed."""
    folder.mkdir()
    (folder / "abc.lock").touch()
    first = b'["v",%d,0]' % version
    (folder / "abc-000001.journal").write_bytes(b"%08x %b\n" % (zlib.crc32(first), first) + written)
    return folder


# --- a process that is killed --------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "enough"),
    [
        # Long enough that some are killed while one is being copied.
        pytest.param(3_000, 2_000, id="thousands"),
        pytest.param(3_000_000, 3, id="large ones"),
    ],
)
def test_what_was_written_survives_kill_9_at_any_instant(tmp_path: Path, length: int, enough: int) -> None:
    luck = random.Random(length)
    for kill in range(4):
        folder = tmp_path / str(kill)
        writing = f"from {__name__} import write_on; write_on({str(folder)!r}, {length})"
        command = [sys.executable, "-c", writing]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            while int(writer.stdout.readline()) < enough:
                pass
            time.sleep(luck.random() / 10)
            writer.kill()
            last = [b"%d" % enough, *writer.stdout.read().splitlines()][-1]
        assert writer.returncode < 0

        costs = recovered(folder)

        assert costs == list(range(1, len(costs) + 1))
        # One may have been written whose writer did not come to say so.
        assert int(last) <= len(costs) <= int(last) + 1


def write_on(folder: str, length: int) -> None:
    """Write spends under holds with names of this length, and say the number of each that is written."""
    journal = Journal(Path(folder), "abc")
    for number in count(1):
        journal.write(record(number, length=length))
        os.write(1, b"%d\n" % number)
        if journal.size > 1_000_000:
            journal.rotate(number, ())


def test_zeros_at_the_end_of_a_segment_are_nothing_to_warn_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path / "living", "abc")
    journal.write(record(1))
    written = segment(tmp_path / "living").read_bytes()
    journal.remove()
    folder = left_behind(tmp_path / "dead", b"")
    segment(folder).write_bytes(written)

    assert written.endswith(bytes(PAGE))
    assert written.rstrip(b"\0").endswith(b"\n")
    assert recovered(folder) == [1]
    assert caplog.text == ""


@pytest.mark.parametrize(
    "half",
    [
        pytest.param(lambda whole: whole[:-2], id="its beginning"),
        pytest.param(lambda whole: whole[:1], id="its first byte"),
        pytest.param(lambda whole: bytes(len(whole) - 10) + whole[-10:], id="its end"),
        pytest.param(lambda whole: whole[:20] + bytes(len(whole) - 40) + whole[-20:], id="both"),
        pytest.param(lambda whole: whole[:20] + bytes(8) + whole[28:], id="all but some of it"),
    ],
)
def test_a_line_that_was_copied_in_part_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, half: Callable[[bytes], bytes]
) -> None:
    folder = left_behind(tmp_path / "dead", line(1) + line(2) + half(line(3)) + bytes(3 * PAGE))

    assert recovered(folder) == [1, 2]
    assert caplog.text.count(UNFINISHED) == 1


@pytest.mark.parametrize("version", [1, 2])
def test_a_segment_of_the_sekha_before_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture, version: int) -> None:
    # One that the disk took in part was closed with a mark, so that the next would not continue it.
    written = line(1) + line(2)[:-9] + b"#\n" + line(3) + line(4)[:-9]
    folder = left_behind(tmp_path / "dead", written, version=version)

    assert recovered(folder) == [1, 3]
    assert caplog.text.count(UNFINISHED) == 2


def test_after_a_power_cut_nothing_counts_that_was_written_behind_what_was_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = b"".join(map(line, range(1, 301)))
    lost = written[: 2 * PAGE] + bytes(PAGE) + written[3 * PAGE :]
    folder = left_behind(tmp_path / "dead", lost + bytes(PAGE))

    assert recovered(folder) == list(range(1, written[: 2 * PAGE].count(b"\n") + 1))
    assert caplog.text.count(UNFINISHED) == 1


# --- room for it ---------------------------------------------------------------------------


def test_a_segment_grows_as_it_is_written_and_ends_with_its_last_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "abc")
    path = segment(tmp_path)
    taken = set()
    for cost in range(1, 16_001):
        journal.write(record(cost))
        taken.add(path.stat().st_size)
        assert journal.size <= max(taken) < journal.size + 1_200_000
    size = journal.size
    journal.close()

    assert len(taken) > 2
    assert path.stat().st_size == size
    assert b"\0" not in path.read_bytes()
    assert recovered(tmp_path) == list(range(1, 16_001))


@pytest.mark.parametrize("length", [1_048_576 - 4_096, 1_048_576, 4_000_000])
def test_a_record_may_be_larger_than_what_is_taken_of_the_disk_at_a_time(tmp_path: Path, length: int) -> None:
    journal = Journal(tmp_path, "abc")
    for cost in (1, 3, 5):
        journal.write(record(cost))
        journal.write(record(cost + 1, length=length))
    journal.close()

    assert recovered(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_segment_that_is_replaced_keeps_what_was_written_and_no_more(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "abc")
    journal.write(record(1))
    size = journal.size
    [first] = journal.rotate(1, [record(2)])
    journal.write(record(3))
    journal.close()

    assert first.stat().st_size == size
    assert recovered(tmp_path) == [1, 2, 3]


# --- a disk that is full -------------------------------------------------------------------


def test_without_room_a_record_is_refused_and_with_room_again_it_is_not(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "abc")
    with room_for(segment(tmp_path).stat().st_size):
        refused = until_refused(journal)
        size = journal.size
        with pytest.raises(LedgerUnavailable, match="File too large"):
            journal.write(record(refused))
        assert journal.size == size
    for cost in range(refused, 20_000):
        journal.write(record(cost))
    journal.close()

    assert 2_000 < refused < 10_000
    assert recovered(tmp_path) == list(range(1, 20_000))


def until_refused(journal: Journal) -> int:
    """Write spends until one is refused; which."""
    for cost in range(1, 20_000):
        try:
            journal.write(record(cost))
        except LedgerUnavailable:
            return cost
    pytest.fail("nothing was refused")


def test_without_room_a_journal_is_not_begun_and_with_room_again_it_is(tmp_path: Path) -> None:
    with room_for(0), pytest.raises(LedgerUnavailable):
        Journal(tmp_path, "abc")
    journal = Journal(tmp_path, "abc")
    journal.write(record(1))
    journal.close()

    assert recovered(tmp_path) == [1]


def test_without_room_for_a_new_segment_a_journal_goes_on_once_there_is(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "abc")
    journal.write(record(1))
    with room_for(0), pytest.raises(LedgerUnavailable):
        journal.rotate(1, ())
    journal.write(record(2))
    replaced = journal.rotate(2, ())
    journal.write(record(3))
    journal.close()

    assert len(replaced) == 2
    assert recovered(tmp_path) == [1, 2, 3]


# --- where no room can be taken beforehand -------------------------------------------------


def refusing(error: int) -> Callable[..., None]:
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(error, os.strerror(error))

    return refuse


@pytest.fixture(params=["takes no room", "cannot be mapped", "takes room anew for what is changed"])
def unable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem on which nobody may copy into memory that maps a file."""
    match request.param:
        case "takes no room":
            monkeypatch.setattr(os, "posix_fallocate", refusing(errno.EOPNOTSUPP))
        case "cannot be mapped":
            monkeypatch.setattr("sekha.ledgers.journal.mmap", refusing(errno.ENODEV))
        case _:
            # As Btrfs answers.
            real = os.fstatvfs
            monkeypatch.setattr(
                os, "fstatvfs", lambda file: os.statvfs_result([*real(file)[:5], 0, 0, 0, *real(file)[8:]])
            )


@pytest.mark.usefixtures("unable")
def test_any_filesystem_will_do(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "abc")
    for cost in range(1, 1_001):
        journal.write(record(cost))
    journal.rotate(1_000, [record(1_001, length=1_000_000)])
    journal.write(record(1_002))
    written = max(tmp_path.glob("*.journal")).read_bytes()
    size = journal.size
    journal.close()

    assert written.rstrip(b"\0") == written[:size]
    assert recovered(tmp_path) == list(range(1, 1_003))


@pytest.mark.usefixtures("unable")
@pytest.mark.parametrize("lacking", [1, 2, 40])
def test_a_record_that_the_disk_took_in_part_is_none_and_what_follows_keeps_its_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lacking: int
) -> None:
    journal = Journal(tmp_path, "abc")
    # Beyond any room that was taken before it was found to be of no use.
    journal.write(record(1, length=400_000))
    begun = journal.size
    journal.write(record(2, length=300))
    length = journal.size - begun

    with room_for(journal.size + length - lacking), pytest.raises(LedgerUnavailable, match="No space left"):
        journal.write(record(3, length=300))
    journal.write(record(4))
    behind = segment(tmp_path).read_bytes()[journal.size :]
    journal.close()

    assert recovered(tmp_path) == [1, 2, 4]
    assert behind == b""
    assert caplog.text == ""


# --- beside others -------------------------------------------------------------------------


def test_it_is_synced_in_a_thread_while_it_is_written_and_goes_on_in_new_segments(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "abc")
    done = Event()

    def sync() -> int:
        times = 0
        while not done.is_set():
            journal.sync()
            times += 1
        return times

    with ThreadPoolExecutor() as threads:
        syncing = threads.submit(sync)
        for spends in range(0, 20_000, 100):
            for cost in range(spends, spends + 100):
                journal.write(record(cost + 1))
            journal.rotate(spends + 100, ())
        done.set()
        times = syncing.result()
    journal.close()

    assert times > 1
    assert recovered(tmp_path) == list(range(1, 20_001))


def test_nothing_is_written_or_synced_once_it_is_closed(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "abc")
    journal.write(record(1))
    journal.close()

    with pytest.raises(LedgerUnavailable):
        journal.write(record(2))
    with pytest.raises(OSError, match="Bad file descriptor"):
        journal.sync()

    assert recovered(tmp_path) == [1]


def test_it_lets_go_of_its_files(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    journal = Journal(tmp_path, "abc")
    for spends in range(5):
        journal.write(record(spends, length=400_000))
        journal.rotate(spends, ())
    journal.sync()
    journal.remove()
    with room_for(0), pytest.raises(LedgerUnavailable):
        Journal(tmp_path, "abc")

    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(LedgerError, match="Name a folder"):
        Journal(tmp_path / "file", "abc")
