"""`sekha keys create`: what it prints is what the gateway takes."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.fixtures.process import Serves
from tests.sekha.cli.conftest import Command

BUILTIN = "providers:\n  - {id: ours, provider_type: builtin, models: [{model_id: echo, task: chat_small}]}\n"


async def test_the_key_is_all_of_stdout_and_never_the_line_for_the_file(sekha: Command) -> None:
    made = await sekha("keys", "create", "research")

    key = made.out.strip()
    assert made.code == 0
    assert re.fullmatch(r"sk-sekha-[\w-]{43}", key)
    assert key not in made.err
    assert 'name: "research", hash: "sha256:' in made.err


@pytest.mark.parametrize("name", ['x"y', "a: b", "back\\slash", "é 👋"])
async def test_any_name_is_printed_as_the_file_takes_it(sekha: Command, name: str) -> None:
    made = await sekha("keys", "create", name)

    (line,) = (line for line in made.err.splitlines() if "hash:" in line)
    assert yaml.safe_load(line)[0]["name"] == name


async def test_a_key_has_a_name(sekha: Command) -> None:
    made = await sekha("keys", "create", "")

    assert (made.code, made.out) == (2, "")
    assert "NAME is empty" in made.err


@pytest.mark.parametrize("name", ["two\nlines", "a\x7f", "a\x85b"])
async def test_a_name_that_nobody_can_read_is_refused(sekha: Command, name: str) -> None:
    made = await sekha("keys", "create", name)

    assert (made.code, made.out) == (2, "")
    assert "nobody can read" in made.err


async def test_two_keys_have_nothing_in_common(sekha: Command) -> None:
    first = await sekha("keys", "create", "a", "--json")
    second = await sekha("keys", "create", "a", "--json")

    assert first.json["key"] != second.json["key"]
    assert first.json["hash"] != second.json["hash"]


async def test_no_other_command_waits_for_what_makes_keys(sekha: Command) -> None:
    looked = await sekha("--help", environment={"PYTHONPROFILEIMPORTTIME": "1"})

    imported = [line.rpartition("|")[2].strip() for line in looked.err.splitlines()]
    assert "sekha.cli.keys" in imported
    assert "sekha.keys" not in imported


async def test_the_printed_line_lets_its_key_in_and_nobody_else(sekha: Command, serving: Serves) -> None:
    made = await sekha("keys", "create", "research")
    lines = made.err.splitlines()
    at = lines.index("keys:")
    section = "\n".join(lines[at : at + 2]) + "\n"
    key = made.out.strip()

    async with serving(BUILTIN + section) as gate:
        nobody = await gate.chat()
        gate.http.headers["authorization"] = f"Bearer {key}x"
        stranger = await gate.chat()
        gate.http.headers["authorization"] = f"Bearer {key}"
        owner = await gate.chat()
        logged = "".join(gate.lines)

    assert (nobody.status_code, stranger.status_code, owner.status_code) == (401, 401, 200)
    assert key not in logged
