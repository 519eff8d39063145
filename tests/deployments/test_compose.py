"""What cannot be run here is at least true: every path and command that the images name is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fixtures.weaviate import NODES, VERSION, WeaviateServer, cluster

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deployments" / "compose.yaml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "deployments" / "Dockerfile").read_text(encoding="utf-8")
DEPLOYMENTS: dict[str, Any] = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text(encoding="utf-8"))


def test_the_image_copies_what_is_there() -> None:
    copied = re.findall(r"^COPY (\S+)", DOCKERFILE, re.MULTILINE)

    assert copied
    assert [path for path in copied if not (ROOT / path).exists()] == []


def test_the_image_holds_every_package_that_the_wheel_does() -> None:
    copied = re.findall(r"^COPY (\S+)", DOCKERFILE, re.MULTILINE)

    assert {"sekha", "blocks", "tasks", "flows"} <= set(copied)


@pytest.mark.parametrize("service", [name for name, each in COMPOSE["services"].items() if "build" in each])
def test_a_service_builds_and_runs_what_exists(service: str) -> None:
    declared = COMPOSE["services"][service]
    build = declared["build"]
    context = (ROOT / "deployments" / build["context"]).resolve()

    assert (context / build["dockerfile"]).is_file()
    if command := declared.get("command"):
        assert importlib.util.find_spec(f"{command[0]}.__main__"), command


def test_services_wait_for_services_that_say_when_they_are_ready() -> None:
    services = COMPOSE["services"]

    for declared in services.values():
        for other, how in declared.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy"
            assert "healthcheck" in services[other]


def as_tested(folder: Path, *, node: bool) -> dict[str, str]:
    """What the servers in tests are told, but for what is theirs alone: ports, keys and places."""
    program = folder / "weaviate-server"
    server = (
        cluster(program, folder)[0] if node else WeaviateServer.private(program, folder, {"ASYNC_INDEXING": "true"})
    )
    return dict(server.environ)


@pytest.mark.parametrize(
    ("service", "node"), [("weaviate", False), ("weaviate-1", True), ("weaviate-2", True), ("weaviate-3", True)]
)
def test_weaviate_is_told_what_it_is_told_in_tests(service: str, node: bool, tmp_path: Path) -> None:
    told, tested = COMPOSE["services"][service]["environment"], as_tested(tmp_path, node=node)

    for name in (
        "ASYNC_INDEXING",
        "AUTHENTICATION_ANONYMOUS_ACCESS_ENABLED",
        "AUTHENTICATION_APIKEY_ENABLED",
        "AUTOSCHEMA_ENABLED",
        "DEFAULT_VECTORIZER_MODULE",
        "DISABLE_TELEMETRY",
        "RAFT_BOOTSTRAP_EXPECT",
    ):
        assert told[name] == tested[name], name
    assert COMPOSE["services"][service]["image"].endswith(f":{VERSION.removeprefix('v')}")


def test_the_nodes_of_the_cluster_are_three_that_know_each_other() -> None:
    nodes = {name: each for name, each in COMPOSE["services"].items() if each.get("profiles") == ["cluster"]}
    told = [each["environment"] for each in nodes.values()]

    assert len(nodes) == NODES
    assert [each["CLUSTER_HOSTNAME"] for each in told] == told[0]["RAFT_JOIN"].split(",")
    assert [each["CLUSTER_JOIN"] for each in told] == ["", *[f"{next(iter(nodes))}:7100"] * (NODES - 1)]
    assert len({each["volumes"][0] for each in nodes.values()}) == NODES


def test_every_deployment_names_a_flow_that_exists() -> None:
    for each in DEPLOYMENTS["deployments"]:
        module, _, name = each["entrypoint"].partition(":")
        flow = getattr(importlib.import_module(module), name)

        assert flow.name == each["name"]
        assert each["pull"] == []
