"""What cannot be run here is at least true: every path and command that the images name is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

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


def test_every_deployment_names_a_flow_that_exists() -> None:
    for each in DEPLOYMENTS["deployments"]:
        module, _, name = each["entrypoint"].partition(":")
        flow = getattr(importlib.import_module(module), name)

        assert flow.name == each["name"]
        assert each["pull"] == []
