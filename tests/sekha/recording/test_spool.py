"""What lies in a spool survives the death of whoever wrote it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import TypeAlias
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekha.calling import Attempt
from sekha.recording.run import CONTENT_BYTES, Event, Run, decode, encode, new_run_id
from sekha.recording.spool import SpoolReader
from sekha.segments import SegmentWriter, waiting_in
from sekha.trace import Step

Makes: TypeAlias = Callable[..., Run]


def test_a_run_comes_back_as_it_was(make_run: Makes) -> None:
    run = make_run(content={"messages": [{"role": "user", "content": "hello"}]}, outcome="fallback", error=None)

    assert decode(encode(run)) == run


@given(st.text(), st.dictionaries(st.text(), st.integers(-(2**53), 2**53) | st.text() | st.none() | st.booleans()))
def test_any_text_comes_back_but_for_what_postgres_cannot_hold(text: str, payload: dict[str, object]) -> None:
    event = Event(id=new_run_id(), occurred_at=1.5, name="sekha.budget.exhausted", resource=text, payload=payload)

    found = decode(encode(event))

    assert isinstance(found, Event)
    assert b"\0" not in found.resource.encode()
    if "\\" not in text and "\0" not in text:
        assert found.resource == text


def test_money_is_kept_to_the_last_digit(make_run: Makes) -> None:
    run = make_run(cost=Decimal("0.000000000001"))

    assert decode(encode(run)).cost == Decimal("0.000000000001")  # type: ignore[union-attr]


def test_content_larger_than_prefect_takes_is_left_out(make_run: Makes) -> None:
    line = encode(make_run(content={"prompt": "x" * CONTENT_BYTES}))

    assert len(line) < 3_000
    assert b"left_out" in line


OLDER_LINE = (
    'R{"id":"019abc00-0000-7000-8000-000000000001","flow":"chat","name":"auto → openai/gpt-5-mini",'
    '"started_at":1763900000.25,"ended_at":1763900001.5,"outcome":"fallback","error":null,"message":"",'
    '"steps":[{"name":"estimate_cost","after":[],"started":1.0,"ended":1.25,"error":null},'
    '{"name":"call_provider","after":[0],"started":1.25,"ended":2.0,"error":null}],'
    '"clock_offset":1763899999.25,"parameters":{"model":"auto"},"content":null,"tags":["team:search"],'
    '"provider_id":"openai","model_id":"gpt-5-mini","estimated_cost":"0.000055","cost":"0.00005",'
    '"attempts":[{"provider_id":"ollama","model_id":"llama3","seconds":0.5,"error":"provider_timeout",'
    '"detail":"no answer in time"},'
    '{"provider_id":"openai","model_id":"gpt-5-mini","seconds":0.25,"error":null,"detail":""}]}'
)
"""As the version before wrote it, whose spool may be waiting when this one starts."""


def test_a_line_of_the_version_before_is_read() -> None:
    run = decode(OLDER_LINE.encode())

    assert run == Run(
        id="019abc00-0000-7000-8000-000000000001",
        flow="chat",
        name="auto → openai/gpt-5-mini",
        started_at=1763900000.25,
        ended_at=1763900001.5,
        outcome="fallback",
        steps=(Step("estimate_cost", (), 1.0, 1.25), Step("call_provider", (0,), 1.25, 2.0)),
        clock_offset=1763899999.25,
        parameters={"model": "auto"},
        tags=("team:search",),
        provider_id="openai",
        model_id="gpt-5-mini",
        estimated_cost=Decimal("0.000055"),
        cost=Decimal("0.00005"),
        attempts=(
            Attempt(
                provider_id="ollama",
                model_id="llama3",
                seconds=0.5,
                error="provider_timeout",
                detail="no answer in time",
            ),
            Attempt(provider_id="openai", model_id="gpt-5-mini", seconds=0.25),
        ),
    )


def test_run_ids_are_uuids_that_sort_by_time() -> None:
    ids = [UUID(new_run_id()) for _ in range(1_000)]

    assert {each.version for each in ids} == {7}
    assert len(set(ids)) == 1_000
    assert [each.int >> 80 for each in ids] == sorted(each.int >> 80 for each in ids)


def test_a_segment_is_read_once_it_is_handed_over_and_gone_once_it_is_done(tmp_path: Path, make_run: Makes) -> None:
    run, event = make_run(), Event(id=new_run_id(), occurred_at=1.0, name="n", resource="r")
    writer, reader = SegmentWriter(tmp_path), SpoolReader(tmp_path)
    writer.write([encode(run), encode(event)])
    before = reader.ready()
    writer.hand_over()

    [path] = reader.ready()
    segment = reader.read(path)

    assert before == []
    assert (segment.runs, segment.events, segment.torn) == ((run,), (event,), 0)
    assert waiting_in(tmp_path).segments == 1
    reader.done(segment)
    assert reader.ready() == []
    assert waiting_in(tmp_path).bytes == 0


def test_segments_of_several_writers_are_read_by_age(tmp_path: Path, make_run: Makes) -> None:
    writers = [SegmentWriter(tmp_path) for _ in range(3)]
    runs = [make_run() for _ in range(3)]
    for writer, run in zip(writers, runs, strict=True):
        writer.write([encode(run)])
    for writer in reversed(writers):
        writer.hand_over()
    reader = SpoolReader(tmp_path)

    assert [run for path in reader.ready() for run in reader.read(path).runs] == runs


WRITES = """
import sys
from pathlib import Path
from sekha.segments import SegmentWriter
writer = SegmentWriter(Path(sys.argv[1]))
writer.write([line for line in sys.stdin.buffer])
print("written", flush=True)
import signal; signal.pause()
"""


def test_what_a_killed_writer_wrote_is_read_and_a_torn_line_is_counted(tmp_path: Path, make_run: Makes) -> None:
    runs = [make_run() for _ in range(5)]
    lines = b"".join(map(encode, runs)) + encode(make_run())[:70]
    reader = SpoolReader(tmp_path)
    writer = subprocess.Popen(
        [sys.executable, "-P", "-c", WRITES, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(lines)
        writer.stdin.close()
        assert writer.stdout.readline() == b"written\n"
        while_it_lived = reader.ready()
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()

    [path] = reader.ready()
    segment = reader.read(path)

    assert while_it_lived == []
    assert segment.runs == tuple(runs)
    assert segment.torn == 1


def test_a_full_disk_raises_and_leaves_whole_lines_only(tmp_path: Path, make_run: Makes) -> None:
    line = encode(make_run())
    code = """
import resource, signal, sys
from pathlib import Path
from sekha.segments import SegmentWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
line = sys.stdin.buffer.read()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(len(line) * 2.5), -1))
writer = SegmentWriter(Path(sys.argv[1]))
for _ in range(3):
    try:
        writer.write([line])
        print("written")
    except OSError as error:
        print(type(error).__name__)
writer.write([line])
writer.hand_over()
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path)], input=line, capture_output=True, timeout=30, check=True
    )
    reader = SpoolReader(tmp_path)

    segments = [reader.read(path) for path in reader.ready()]

    assert done.stdout.split() == [b"written", b"written", b"OSError"]
    assert [(len(each.runs), each.torn) for each in segments] == [(2, 0), (1, 0)]


def test_a_line_that_is_no_run_is_refused() -> None:
    with pytest.raises(ValueError, match="no run"):
        decode(b'R{"steps": [], "attempts": [], "tags": []}\n')
    with pytest.raises(ValueError, match=r"."):
        decode(b"R\n")


@pytest.mark.parametrize("after", [(0,), (1,), (-1,), (7,)])
def test_a_step_that_comes_after_none_before_it_makes_no_run(make_run: Makes, after: tuple[int, ...]) -> None:
    line = encode(make_run(steps=(Step("a", after, 1.0, 2.0),)))

    with pytest.raises(ValueError, match="no run"):
        decode(line)


def test_steps_come_back_as_steps(make_run: Makes) -> None:
    found = decode(encode(make_run(steps=(Step("a", (), 1.0, 2.0, error="rate_limited"),))))

    assert isinstance(found, Run)
    assert found.steps == (Step("a", (), 1.0, 2.0, error="rate_limited"),)
