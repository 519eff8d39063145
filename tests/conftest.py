"""What holds for every test: no network but this machine's own, and nothing of the developer's environment."""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

pytest_plugins = [
    "tests.fixtures.gateway",
    "tests.fixtures.postgres",
    "tests.fixtures.pipeline",
    "tests.fixtures.prefect",
    "tests.fixtures.process",
    "tests.fixtures.weaviate",
]

# A shell that starts something in the background has it ignore Ctrl-C, and every child with it. Commands that
# are interrupted here are to be interrupted wherever the tests were started from.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Read by `sekha.loading`, by Prefect and by providers: a test that wants one sets it. Done here, before
# anything is imported that reads them, and not in a fixture.
_READ = {
    "CHAT_MODEL",
    "EMBEDDING_MODEL",
    "HOST",
    "LLM_CONFIG_PATH",
    "LOG_LEVEL",
    "OLLAMA_BASE_URL",
    "OLLAMA_URL",
    "PORT",
    "SUMMARIZATION_MODEL",
    "VISION_MODEL",
}
for _name in list(os.environ):
    ours = _name.startswith(("SEKHA_", "PREFECT_")) and not _name.startswith("SEKHA_TEST_")
    if ours or _name in _READ or _name.endswith("_API_KEY"):
        del os.environ[_name]

# The machine that runs this may be busy, and a failure must come back when it is looked for.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("suite")

_ONE_SERVER = {"prefect": "prefect", "weaviate_server": "weaviate", "weaviate_program": "weaviate"}
"""Fixture → the group of those who share its server, which takes long to start: one process runs them all."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if group := next(
            (_ONE_SERVER[name] for name in getattr(item, "fixturenames", ()) if name in _ONE_SERVER), None
        ):
            item.add_marker(pytest.mark.xdist_group(group))


_refused: list[str] = []


def _is_here(host: object) -> bool:
    if not isinstance(host, str):  # a Unix socket's path in bytes, or no host at all
        return True
    if host in ("", "localhost") or host.startswith("/"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _refuse(event: str, args: tuple[object, ...]) -> None:
    """An audit hook sees what any Python code does with a socket, whichever library it is."""
    match event, args:
        case "socket.connect" | "socket.sendto", (_, (host, *_)):
            wanted: object = host
        case "socket.getaddrinfo" | "socket.gethostbyname", (host, *_):
            wanted = host
        case _:
            return
    if not _is_here(wanted):
        _refused.append(f"{event} {wanted!r}")
        raise ConnectionRefusedError(f"tests reach nothing beyond this machine: {event} {wanted!r}")


sys.addaudithook(_refuse)


@pytest.fixture(autouse=True)
def refused_connections() -> Iterator[list[str]]:
    """Fails the test that tried, even where the attempt was caught. One that tries on purpose clears the list."""
    _refused.clear()
    yield _refused
    assert not _refused
