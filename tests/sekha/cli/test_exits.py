from __future__ import annotations

import json
import os
from collections.abc import Iterator

import click
import pytest

from sekha import errors
from sekha.cli.exits import EXITS, exit_code, report
from sekha.errors import SekhaError


def every_error(kind: type[SekhaError] = SekhaError) -> Iterator[type[SekhaError]]:
    for inner in kind.__subclasses__():
        if inner.__module__ == errors.__name__:
            yield inner
            yield from every_error(inner)


@pytest.mark.parametrize("kind", list(every_error()), ids=lambda kind: kind.__name__)
def test_every_error_of_ours_has_an_exit_code_of_its_own_kind(kind):
    code = exit_code(kind.__new__(kind))

    assert code in EXITS
    assert code not in (0, 1, 2)


def test_usage_interruption_and_bugs_have_codes_of_their_own():
    assert exit_code(click.UsageError("x")) == 2
    assert exit_code(KeyboardInterrupt()) == 130
    assert exit_code(ZeroDivisionError()) == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_a_bug_shows_its_kind_and_nothing_that_it_says(capsys, as_json):
    ended = report(ValueError("sk-canary and a prompt"), as_json=as_json)

    shown = capsys.readouterr().err
    assert ended == 1
    assert "ValueError" in shown
    assert "report" in shown
    assert "canary" not in shown


def test_an_error_for_programs_is_one_line_with_its_data(capsys):
    error = errors.NoCandidate("'vision'", [("openai/gpt", "it does not take images")], retryable=True)

    report(error, as_json=True)

    said = json.loads(capsys.readouterr().err)["error"]
    assert said["code"] == "no_candidate"
    assert said["exit_code"] == 4
    assert said["retryable"] is True
    assert said["reasons"] == [["openai/gpt", "it does not take images"]]


async def test_a_reader_that_stops_early_ends_the_command_quietly(sekha):
    process = await sekha.start("check", "--schema")
    assert process.stdout is not None
    process.stdout._transport.close()

    _, err = await process.communicate()

    assert err == b""
    assert process.returncode == 141


async def test_a_traceback_is_shown_when_it_is_asked_for(sekha):
    process = await sekha.start("search", " ", environment={"SEKHA_DEBUG": "1"})

    _, err = await process.communicate()

    assert b"Traceback" in err
    assert process.returncode == 4


@pytest.mark.parametrize("command", ["run", "up"])
async def test_a_block_cannot_configure_a_server_that_is_yet_to_start(sekha, command):
    ended = await sekha("-c", "block:sekha", command)

    assert ended.code == 2
    assert "name a file" in ended.err


async def test_an_unwritable_character_becomes_a_question_mark(sekha):
    ended = await sekha("chat", "naïve → 東京", environment={"PYTHONIOENCODING": "ascii"})

    assert ended.code == 0
    assert "na?ve ? ??" in ended.out


async def test_only_a_terminal_gets_colour(sekha):
    piped = await sekha("check")

    assert "\x1b" in await on_a_terminal(sekha, "check")
    assert "\x1b" not in await on_a_terminal(sekha, "check", NO_COLOR="1")
    assert "\x1b" not in piped.out + piped.err


async def test_a_narrow_terminal_wraps_and_a_pipe_does_not(sekha):
    name = "a-provider-with-quite-a-long-name-for-a-narrow-terminal"
    sekha.write(
        "sekha.yaml",
        f"providers:\n  - {{id: {name}, provider_type: builtin, models: [{{model_id: echo, task: chat_small}}]}}\n",
    )

    narrow = await on_a_terminal(sekha, "models", COLUMNS="40", NO_COLOR="1")
    piped = await sekha("models", environment={"COLUMNS": "40"})

    assert max(len(line) for line in narrow.splitlines()) <= 60
    assert f"{name}/echo  chat_small" in piped.out


async def on_a_terminal(sekha, *arguments: str, **environment: str) -> str:
    """What the command writes when its output is a terminal."""
    import asyncio
    import pty

    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *sekha.line(arguments),
        cwd=sekha.folder,
        env=sekha.environment | {"TERM": "xterm-256color"} | environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    await process.wait()
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # Linux says so when the last writer has gone
        pass
    finally:
        os.close(ours)
    return written.decode()
