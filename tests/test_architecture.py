"""The dependency rule, read from the imports themselves, lazy ones inside functions too."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = ("sekha", "blocks", "tasks", "flows")
"""Each may import those before it."""
COMPOSITION = ("sekha/cli/", "sekha/__main__.py")
"""They wire everything together, so they alone in `sekha/` may import the layers above; nobody imports them."""
PUBLISHER = ("sekha/recording/prefect_api.py", "sekha/recording/prefect_choice.py")

ONLY_IN = {
    # In `sekha/`, only what the publisher's own process loads.
    "prefect": ("blocks/", "tasks/", "flows/", *COMPOSITION, *PUBLISHER),
    "litellm": ("sekha/providers/litellm.py",),
    "weaviate": ("sekha/vectors/weaviate.py", "sekha/vectors/weaviate_properties.py"),
    "yaml": ("sekha/yaml_file.py",),
    "psycopg": ("sekha/ledgers/postgres.py", "sekha/recording/prefect_postgres.py"),
    "tiktoken": ("sekha/tokens.py",),
    "tokenizers": ("sekha/tokens.py",),
    "rich": COMPOSITION,
    "click": (*COMPOSITION, "sekha/testing.py"),
}

VALUES = (
    "values",
    "errors",
    "pricing",
    "images",
    "vision",
    "registry",
    "ledger",
    "asks",
    "eligible",
    "places",
    "field",
    "lineup",
    "routing",
    "rates",
    "latency",
    "breaker",
    "calling",
    "trace",
    "documents",
)
"""Modules that are values and pure functions: they import each other, downward, and nothing that acts."""
# Only for an annotation, so no cycle when it runs.
VALUES_MAY = {"registry": {"sekha.config", "sekha.price_map"}, "errors": {"sekha.ingest", "sekha.calling"}}
VALUES_COMPUTE = {"field": {"numpy"}}
"""Where numbers are many, NumPy is arithmetic; it is imported when they are."""
ACTS = {"aiohttp", "asyncio", "fastapi", "httpx", "numpy", "requests", "socket", "sqlite3", "subprocess", "urllib"}


def imported(source: str) -> Iterator[tuple[str, bool]]:
    """Every module that is imported, by its full name, and whether for type checkers alone."""
    tree = ast.parse(source)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(level=0, module=str(module)):
                names = [f"{module}.{alias.name}" for alias in node.names] if module in LAYERS else [module]
            case ast.ImportFrom():
                names = ["."]
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names = [name]
        for name in names:
            yield name, id(node) in for_types


def violations(files: dict[str, str]) -> list[str]:
    """What breaks the rule in these files, path → source."""
    found: list[str] = []
    for path, source in files.items():
        layer = path.split("/")[0]
        for name, _ in imported(source):
            package = name.split(".")[0]
            if name == ".":
                found.append(f"{path} imports relatively: write the whole name")
            if package in LAYERS[LAYERS.index(layer) + 1 :] and not path.startswith(COMPOSITION):
                found.append(f"{path} imports {name}: `{layer}` may not know `{package}`")
            if package in ("tests", "docs", "benchmarks"):
                found.append(f"{path} imports {name}: it is not shipped")
            if name.startswith(("sekha.cli", "sekha.__main__")) and not path.startswith(COMPOSITION):
                found.append(f"{path} imports {name}: nobody imports what wires everything")
            if package in ONLY_IN and not path.startswith(ONLY_IN[package]):
                found.append(f"{path} imports {name}: `{package}` enters through {', '.join(ONLY_IN[package])}")
        found += impurities(path, source)
    return list(dict.fromkeys(found))


def impurities(path: str, source: str) -> Iterator[str]:
    module = path.removeprefix("sekha/").removesuffix(".py")
    if path != f"sekha/{module}.py" or module not in VALUES:
        return
    for name, for_types in imported(source):
        inner = name.split(".")[1] if name.startswith("sekha.") else None
        if name.split(".")[0] in ACTS - VALUES_COMPUTE.get(module, set()):
            yield f"{path} imports {name}: a value module acts on nothing"
        if inner and inner not in VALUES:
            allowed = VALUES_MAY.get(module, set())
            if not (for_types and f"sekha.{inner}" in allowed):
                yield f"{path} imports {name}: a value module imports value modules only"


def shipped() -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
        for layer in LAYERS
        for path in sorted((ROOT / layer).rglob("*.py"))
    }


def test_arrows_point_one_way_and_foreign_packages_enter_through_one_door() -> None:
    assert violations(shipped()) == []


@pytest.mark.parametrize(
    ("path", "line", "says"),
    [
        ("sekha/routing.py", "from tasks.calls import call_provider", "`sekha` may not know `tasks`"),
        ("sekha/chat.py", "def f():\n    import flows.chat", "`sekha` may not know `flows`"),
        ("blocks/provider.py", "import tasks", "`blocks` may not know `tasks`"),
        ("tasks/calls.py", "from flows import chat", "`tasks` may not know `flows`"),
        ("sekha/runtime.py", "from prefect import task", "`prefect` enters through blocks/"),
        ("sekha/recording/recorder.py", "import prefect", "`prefect` enters through blocks/"),
        ("sekha/chat.py", "import_module('litellm')", "`litellm` enters through sekha/providers/litellm.py"),
        ("sekha/chat.py", "importlib.import_module('prefect')", "`prefect` enters through blocks/"),
        ("flows/chat.py", "import yaml", "`yaml` enters through sekha/yaml_file.py"),
        ("sekha/runtime.py", "from sekha import cli", "nobody imports what wires everything"),
        ("sekha/runtime.py", "from .chat import answer", "imports relatively"),
        ("sekha/runtime.py", "from tests.fixtures import pipeline", "it is not shipped"),
        ("sekha/pricing.py", "import sqlite3", "a value module acts on nothing"),
        ("sekha/routing.py", "from sekha.resources import Resources", "imports value modules only"),
        ("sekha/registry.py", "from sekha.config import Config", "imports value modules only"),
    ],
)
def test_a_planted_violation_is_found(path: str, line: str, says: str) -> None:
    planted = {**shipped(), path: f"{shipped()[path]}\n{line}\n"}

    (found,) = violations(planted)

    assert found.startswith(path)
    assert says in found


def test_value_modules_import_each_other_without_a_circle() -> None:
    graph = {
        module: {
            name.split(".")[1]
            for name, for_types in imported((ROOT / "sekha" / f"{module}.py").read_text("utf-8"))
            if name.startswith("sekha.") and not for_types
        }
        & set(VALUES)
        for module in VALUES
    }
    left = set(VALUES)
    while free := {module for module in left if not graph[module] & left}:
        left -= free

    assert left == set()


HEAVY = ("litellm", "prefect", "numpy", "weaviate", "aiohttp", "fastapi", "tiktoken")


@pytest.mark.parametrize(
    "statement",
    [
        "import sekha",
        "import sekha.errors, sekha.routing",
        "import sekha.recording.recorder, sekha.recording.publisher",
        "import sekha.loading; sekha.loading.load('sekha.yaml')",
    ],
)
def test_starting_imports_nothing_heavy(statement: str, tmp_path: Path) -> None:
    model = "{model_id: gpt-4o, task: chat_small}"
    (tmp_path / "sekha.yaml").write_text(f"providers:\n  - {{id: a, provider_type: openai, models: [{model}]}}\n")
    code = f"{statement}; import sys; print([name for name in {HEAVY} if name in sys.modules])"

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert done.stdout.strip() == "[]"


def test_the_network_beyond_this_machine_is_refused(refused_connections: list[str]) -> None:
    with pytest.raises(ConnectionRefusedError, match="nothing beyond this machine"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(ConnectionRefusedError, match="nothing beyond this machine"):
        socket.getaddrinfo("example.com", 443)

    assert len(refused_connections) == 2
    refused_connections.clear()


def test_no_environment_of_the_developers_reaches_a_test() -> None:
    assert not [name for name in os.environ if name.startswith("SEKHA_") and not name.startswith("SEKHA_TEST_")]
    assert not [name for name in os.environ if name.endswith("_API_KEY")]
