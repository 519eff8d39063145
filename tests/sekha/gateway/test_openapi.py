"""The description of the API: all of it, nothing else, and true of every answer."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from html.parser import HTMLParser
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from sekha import errors
from sekha.documents import Document
from sekha.errors import SekhaError
from sekha.gateway.app import ROUTES
from sekha.gateway.openapi import CODES, document
from sekha.gateway.problems import status_of
from sekha.registry import TASKS
from sekha.testing import StandIn
from tests.fixtures.gateway import Opens, Served, config_for

DOCUMENT = document()
OPERATIONS = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods]

# --- what it says --------------------------------------------------------------------------


def test_every_route_is_described_and_everything_described_is_served() -> None:
    served = {(path, method.lower()) for path, methods in ROUTES.items() for method in methods}

    assert set(OPERATIONS) == served


def test_every_schema_is_one() -> None:
    for name, schema in DOCUMENT["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema, name


def test_every_reference_leads_somewhere_and_every_schema_is_used() -> None:
    used = set(re.findall(r"'#/components/schemas/(\w+)'", str(DOCUMENT)))

    assert used == set(DOCUMENT["components"]["schemas"])


def test_every_operation_has_a_name_of_its_own_and_says_what_it_does() -> None:
    operations = [DOCUMENT["paths"][path][method] for path, method in OPERATIONS]

    assert len({each["operationId"] for each in operations}) == len(operations)
    for each in operations:
        assert each["summary"]
        assert each["description"].endswith(".")
        assert each["tags"][0] in {tag["name"] for tag in DOCUMENT["tags"]}


def every_kind(root: type[SekhaError] = SekhaError) -> Iterator[type[SekhaError]]:
    yield root
    for kind in root.__subclasses__():
        yield from every_kind(kind)


def test_every_code_is_documented_under_its_status() -> None:
    # What only commands and flows meet.
    elsewhere = {"request_refused", "config_missing", "alias_moved", "record_error", "prefect_unavailable"}
    elsewhere |= {"ingest_incomplete", "backup_missing", "backup_broken", "store_in_use", "store_not_empty"}
    kinds = [kind for kind in every_kind() if kind.__module__ == errors.__name__ and kind.code not in elsewhere]
    statuses = {kind.code: status_of(kind.__new__(kind)) for kind in kinds if kind.__name__ != "NoSuchPage"}

    documented = {code: status for status, codes in CODES.items() for code in codes}

    assert documented.pop("not_found") == 404
    assert documented == statuses


# --- the page ------------------------------------------------------------------------------


class Loads(HTMLParser):
    """What a page would load, and whether it is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.loads += [
            str(value) for name, value in attrs if name in ("src", "srcset") or (tag, name) == ("link", "href")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


async def test_the_page_shows_every_operation_and_loads_nothing(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        answer = await served.http.get("/docs")

        page = Loads()
        page.feed(answer.text)
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert (page.loads, page.open) == ([], [])
        assert not re.search(r"@import|url\(|fetch\(", answer.text)
        for path, method in OPERATIONS:
            operation = DOCUMENT["paths"][path][method]
            assert f'id="{operation["operationId"]}"' in answer.text
            assert f"curl {path}" in answer.text.replace("http://localhost:5001", "").replace("&#x27;", "")


async def test_programs_are_given_the_description_as_json(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        answer = await served.http.get("/openapi.json")

        assert answer.json() == DOCUMENT


# --- what is true of every answer ----------------------------------------------------------

CHECKED = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
EVERY_TASK = "\n".join(
    f"      - {{model_id: for-{task}, task: {task}, supports_vision: true, price: free}}"
    for task in TASKS
    if task != "embedding"
)


@pytest.fixture
def served(gateway: Opens) -> Iterator[Served]:
    """A gateway with a model for each task and a document to find, on a loop that its clients know nothing of."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    async def opened(closing: AsyncExitStack) -> Served:
        standin = await closing.enter_async_context(StandIn(dimension=8))
        config = config_for(standin, extra="collections: {documents: {model: vectors}}\n")
        served = await closing.enter_async_context(
            gateway(config=config.replace("    models:\n", f"    models:\n{EVERY_TASK}\n"))
        )
        await served.serving.runtime.ingest([Document(source="cats.md", text="Cats sleep on warm windowsills.")])
        return served

    closing = AsyncExitStack()
    try:
        yield run(opened(closing))
    finally:
        run(closing.aclose())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def tried(served: Served, path: str, method: str, mode: GenerationMode, examples: int) -> list[int]:
    """Send what the description allows, or what it forbids, and check each answer against it; the statuses."""
    operation = schemathesis.openapi.from_dict(DOCUMENT)[path][method]
    statuses: list[int] = []

    @settings(max_examples=examples, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Case) -> None:
        response = case.call(base_url=served.url, timeout=20, allow_redirects=False)

        assert response.status_code < 500 or documented_refusal(path, response.status_code, response.json()), (
            response.text
        )
        case.validate_response(response, checks=CHECKED)
        statuses.append(response.status_code)

    send()
    return statuses


def documented_refusal(path: str, status: int, said: Any) -> bool:
    """That no model fits what was asked is what a gateway may have to say, and no failure."""
    return status == 503 and (
        said["error"]["code"] == "no_candidate" or (path == "/api/v1/route" and "candidates" in said)
    )


WITH_A_BODY = [(path, method) for path, method in OPERATIONS if method == "post"]


def fuzz(served: Served, examples: int) -> None:
    for path, method in OPERATIONS:
        statuses = tried(served, path, method, GenerationMode.POSITIVE, examples)
        assert statuses, path
    for path, method in [*WITH_A_BODY, ("/api/v1/costs", "get")]:
        statuses = tried(served, path, method, GenerationMode.NEGATIVE, examples)
        assert 400 in statuses, path


def test_whatever_is_sent_no_answer_is_a_failure_and_each_is_as_described(served: Served) -> None:
    fuzz(served, 6)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_however_much_is_sent_no_answer_is_a_failure_and_each_is_as_described(served: Served) -> None:
    fuzz(served, 200)
