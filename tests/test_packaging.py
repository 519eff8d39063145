"""What is shipped, under which names, and that it works from the wheel alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

import sekha

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sekha", "blocks", "tasks", "flows")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-setup.lock")


# --- names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKAGES)
def test_our_general_names_are_claimed_by_nobody_else(name: str) -> None:
    assert set(packages_distributions().get(name, ())) <= {"sekha"}
    found = find_spec(name)
    assert found is not None
    assert Path(str(found.origin)).is_relative_to(ROOT)


def test_every_package_has_an_init_and_no_test_folder_has() -> None:
    folders = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}

    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []
    # With one, `from tasks.calls import …` in a test would look in tests/tasks.
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def modules() -> Iterator[tuple[str, ast.Module]]:
    for name in PACKAGES:
        for path in sorted((ROOT / name).rglob("*.py")):
            dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield dotted.removesuffix(".__init__"), ast.parse(path.read_text("utf-8"))


def declared(tree: ast.Module) -> list[str]:
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                return list(ast.literal_eval(value))
    return []


def test_what_one_module_takes_from_another_is_public_there() -> None:
    trees = dict(modules())
    public = {name: declared(tree) for name, tree in trees.items()}
    taken = [
        f"{name} takes {alias.name} from {node.module}"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in trees
        for alias in node.names
        if f"{node.module}.{alias.name}" not in trees and alias.name not in public[node.module]
    ]

    assert taken == []


def bound(tree: ast.Module) -> Iterator[str]:
    """The names that a module binds, as far as reading shows."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from (alias.asname or alias.name for alias in names)


def test_what_is_declared_public_is_there_once() -> None:
    for name, tree in modules():
        names = declared(tree)

        assert len(set(names)) == len(names), name
        assert set(names) - set(bound(tree)) == set(), name


def test_the_packages_public_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse((ROOT / "sekha" / "__init__.py").read_text("utf-8"))
    for_types = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("sekha.")
        for alias in node.names
        if alias.name[0].isupper() or alias.name == "load"
    ]

    assert sorted({*for_types, "open"} - {"Resources"}) == sorted(sekha.__all__)


# --- locks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_hold_versions_and_hashes_and_no_address(lock: str) -> None:
    text = (ROOT / lock).read_text("utf-8")
    pinned = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]

    assert pinned
    assert "://" not in text
    assert not re.search(r"^--?(index|extra|find|trusted|i )", text, re.MULTILINE)
    for line in pinned:
        assert re.match(r"[a-z0-9][a-z0-9._-]*==[^ ]+ ", line), line
    assert all("--hash=sha256:" in block for block in re.split(r"\n(?=[a-z])", text.strip()))


def test_every_dependency_is_locked() -> None:
    def locked(lock: str) -> set[str]:
        return set(re.findall(r"^([a-z0-9._-]+)==", (ROOT / lock).read_text("utf-8"), re.MULTILINE))

    def names(requirements: list[str]) -> set[str]:
        found = (re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in requirements)
        return {name[0].lower() for name in found if name}

    assert names(PROJECT["project"]["dependencies"]) <= locked("requirements.lock")
    assert names(PROJECT["dependency-groups"]["dev"]) <= locked("requirements-dev.lock")
    assert names(PROJECT["build-system"]["requires"]) <= locked("requirements-setup.lock")
    assert locked("requirements.lock") <= locked("requirements-dev.lock")


# --- the wheel -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_four_packages_and_the_deployments_and_no_test(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()

    for package in PACKAGES:
        sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert sources <= set(names)
    assert {"sekha/deployments/automations.yaml", "sekha/deployments/prefect.yaml"} <= set(names)
    assert "sekha/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {*PACKAGES, f"sekha-{PROJECT['project']['version']}.dist-info"}


def test_the_wheel_says_what_it_is_and_is_published_nowhere_by_accident(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folder = f"sekha-{PROJECT['project']['version']}.dist-info"
        metadata = archive.read(f"{folder}/METADATA").decode()
        entries = archive.read(f"{folder}/entry_points.txt").decode()

    assert "License-Expression: Apache-2.0" in metadata
    assert "Classifier: Private :: Do Not Upload" in metadata
    assert "sekha = sekha.__main__:main" in entries
    assert "[prefect.collections]\nsekha = blocks" in entries


def test_everything_imports_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = (
        "import sekha, blocks; from tasks.calls import call_provider; from flows.chat import chat; "
        "print(sekha.__file__, call_provider.name, chat.name)"
    )

    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(tmp_path / "installed"),
            "PREFECT_HOME": str(tmp_path / "prefect"),
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )

    assert done.stdout.split() == [str(tmp_path / "installed" / "sekha" / "__init__.py"), "call_provider", "chat"]


def test_a_users_type_checker_knows_what_the_wheel_gives(wheel: Path, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    wrong = "async def wrong() -> None:\n    async with sekha.open() as s:\n        (await s.chat(7)).txet\n"
    (tmp_path / "program.py").write_text(f"{program}\n\n{wrong}")
    # On the interpreter's path, where a type checker believes only packages that ship `py.typed`.
    site = tmp_path / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)

    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--config-file=",
            "--cache-dir",
            str(tmp_path / "cache"),
            "program.py",
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    said = sorted(line.partition(": error: ")[2] for line in done.stdout.splitlines() if ": error: " in line)
    assert len(said) == 2, done.stdout
    assert said[0].startswith('"Reply" has no attribute "txet"')
    assert said[1].startswith('Argument 1 to "chat" of "Runtime" has incompatible type "int"')
