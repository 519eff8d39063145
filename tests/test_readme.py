"""What the README shows works as shown, and no page points to nothing."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click import Context
from click.testing import CliRunner

from sekha.cli.app import sekha
from sekha.loading import parse
from sekha.yaml_file import read

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith("sekha ")]


def test_the_program_runs_and_the_second_time_embeds_nothing(tmp_path: Path) -> None:
    (program,) = blocks("python")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")

    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]

    assert "echo $0" in runs[0]
    assert re.search(r"[1-9]\d* chunks embedded, 0 unchanged", runs[0])
    assert re.search(r"\b0 chunks embedded, [1-9]\d* unchanged", runs[1])
    assert "glossary.md" in runs[1]


def test_the_configuration_is_valid() -> None:
    (configuration,) = blocks("yaml")

    loaded = parse(read(configuration), source="README.md", folder=ROOT, environ={"OPENAI_API_KEY": "sk-example"})

    assert not loaded.warnings


@pytest.mark.parametrize("command", commands())
def test_a_command_is_one_that_the_command_line_takes(command: str) -> None:
    words = shlex.split(command)[1:]
    group = sekha
    while words and words[0] in getattr(group, "commands", {}):
        group = group.commands[words.pop(0)]

    group.make_context(command, words, parent=Context(sekha, **sekha.context_settings))

    assert CliRunner().invoke(sekha, [*shlex.split(command)[1:2], "--help"]).exit_code == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_points_to_nothing_that_is_not_there(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]

    missing = [target for target in targets if not (page.parent / target).exists()]

    assert not missing


def test_every_make_target_that_a_page_names_is_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z]+)", page.read_text(encoding="utf-8"))}

    assert named <= targets
