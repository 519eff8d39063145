from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sekha.cli.app import sekha as cli

ROOT = Path(__file__).resolve().parents[3]


def every_command(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))


@pytest.mark.parametrize("path", list(every_command()), ids=" ".join)
def test_every_command_explains_itself_with_two_examples(path):
    shown = CliRunner().invoke(cli, [*path, "--help"])

    assert shown.exit_code == 0
    examples = shown.output.partition("Examples:")[2].partition("Options:")[0]
    lines = re.findall(rf"\bsekha (-\S+ \S+ )*{' '.join(path)}\b", examples)
    assert len(lines) == (0 if path in (("blocks",), ("keys",), ("import",)) else 2)


def test_the_help_lists_the_commands_in_the_order_of_their_use():
    shown = CliRunner().invoke(cli, ["--help"]).output

    wanted = [
        "check",
        "models",
        "route",
        "chat",
        "ingest",
        "search",
        "import",
        "serve",
        "keys",
        "costs",
        "doctor",
        "backup",
        "backups",
        "restore",
        "run",
        "up",
        "deploy",
        "blocks",
    ]
    at = [shown.index(f"\n  {name} ") for name in wanted]
    assert at == sorted(at)


async def test_a_narrow_terminal_shows_what_each_command_does_whole(sekha):
    ended = await sekha("--help", environment={"COLUMNS": "50"})

    assert "Validate the configuration and print what it comes to." in " ".join(ended.out.split())


async def test_a_mistyped_command_is_answered_with_the_nearest(sekha):
    ended = await sekha("serach", "x")

    assert ended.code == 2
    assert "Did you mean 'search'?" in ended.err


async def test_the_version_is_one_line(sekha):
    ended = await sekha("--version")

    assert ended.code == 0
    assert ended.out.startswith("sekha ")


@pytest.mark.parametrize("arguments", [["--help"], ["check"], ["models", "--json"]])
def test_looking_imports_nothing_heavy(arguments, tmp_path):
    heavy = ("litellm", "prefect", "numpy", "weaviate", "aiohttp")
    program = (
        "import sys\n"
        "from sekha.cli.app import main\n"
        f"try:\n    main({arguments!r})\n"
        "except SystemExit as ended:\n    assert ended.code == 0, ended.code\n"
        f"assert not set({heavy!r}) & set(sys.modules), set({heavy!r}) & set(sys.modules)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
