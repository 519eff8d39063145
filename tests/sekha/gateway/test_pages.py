"""What an operator asks over HTTP: routes, models, searches and costs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from sekha.documents import Document
from sekha.keys import hash_of, new_key
from sekha.recording.run import Outcome, Run
from sekha.registry import TASKS
from sekha.testing import StandIn
from tests.fixtures.gateway import Opens, config_for

DOCUMENTS = [
    Document(source="cats.md", text="Cats sleep on warm windowsills."),
    Document(source="ships.md", text="Container ships cross the ocean."),
]
COLLECTIONS = "collections:\n  documents: {model: vectors}\n  notes: {model: vectors}\n"


# --- routes --------------------------------------------------------------------------------


async def test_a_route_names_the_first_and_explains_every_candidate(gateway: Opens) -> None:
    async with StandIn() as first, StandIn() as second, gateway(first, second) as served:
        answer = await served.http.post("/api/v1/route", json={"task": "chat_small", "max_tokens": 50})

        said = answer.json()
        assert answer.status_code == 200
        assert (said["provider_id"], said["provider_type"], said["model_id"]) == ("first", "openai", "chat")
        assert said["reason"] == "priority 1, then price"
        assert 0 < said["estimated_cost"] <= said["worst_case_cost"]
        one, other = said["candidates"]
        assert (one["place"], other["place"]) == (1, 2)
        assert (one["rule"], one["circuit"], one["budgets"]) == (None, "closed", {"all": 1000.0})
        assert one["price"]["output_tokens"] == 50
        assert one["capability"]["tasks"] == ["chat_small"]
        assert (first.requests, second.requests) == ([], [])
        assert await served.held() == 0


async def test_a_route_says_which_rule_dropped_a_candidate(gateway: Opens) -> None:
    async with StandIn() as first, StandIn() as second, gateway(first, second) as served:
        asked = {"task": "chat_small", "max_tokens": 50, "max_cost": 0.15}

        said = (await served.http.post("/api/v1/route", json=asked)).json()

        assert [each["rule"] for each in said["candidates"]] == [None, "cost"]
        assert "above `max_cost`" in said["candidates"][1]["reason"]


async def test_an_unknown_task_is_refused_with_those_that_there_are(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        answer = await served.http.post("/api/v1/route", json={"task": "chat_smal"})

        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "task"
        assert all(task in answer.json()["error"]["message"] for task in TASKS)


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"task": "audio"}, "no_candidate"),
        ({"task": "chat_small", "require_vision": True}, "model_not_capable"),
        ({"task": "chat_small", "max_cost": 0}, "cost_refused"),
        ({"task": "chat_small", "context_size": 10_000_000}, "budget_exceeded"),
    ],
)
async def test_where_nothing_fits_the_answer_is_503_and_says_why(
    gateway: Opens, asked: dict[str, Any], code: str
) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        answer = await served.http.post("/api/v1/route", json=asked)

        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == code
        assert all(each["place"] is None and each["rule"] for each in answer.json()["candidates"])
        assert standin.requests == []


async def test_a_context_size_stands_for_messages_that_are_not_there(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        small = (await served.http.post("/api/v1/route", json={"task": "chat_small"})).json()
        large = (await served.http.post("/api/v1/route", json={"task": "chat_small", "context_size": 5000})).json()

        assert large["candidates"][0]["price"]["input_tokens"] == 5000
        assert large["estimated_cost"] > small["estimated_cost"]


async def test_the_route_of_a_chat_is_asked_with_its_own_body(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        picture = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png", "detail": "low"}}
        chat = {"messages": [{"role": "user", "content": [picture]}], "temperature": 0.5, "stream": True}

        said = (await served.http.post("/api/v1/route", json=chat)).json()

        assert said["model_id"] == "eyes"
        assert {each["model_id"]: each["rule"] for each in said["candidates"]} == {"eyes": None, "chat": "capability"}


ASKED = [{"role": "user", "content": "Hello there."}]


@pytest.mark.parametrize(
    ("call", "body"),
    [
        ("/v1/chat/completions", {"messages": ASKED, "task": "embedding"}),
        ("/v1/chat/completions", {"messages": ASKED, "input": "a", "task": "embedding"}),
        ("/v1/chat/completions", {"messages": ASKED, "stream": "yes"}),
        ("/v1/chat/completions", {"messages": ASKED, "store": "yes"}),
        ("/v1/embeddings", {"input": "a", "task": "chat_small"}),
        ("/v1/embeddings", {"input": "a", "store": "yes"}),
    ],
)
async def test_a_body_that_the_call_refuses_has_no_route_and_the_same_answer(
    gateway: Opens, call: str, body: dict[str, Any]
) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        refused = await served.http.post(call, json=body)
        routed = await served.http.post("/api/v1/route", json=body)

    assert refused.status_code == routed.status_code == 400
    assert routed.json() == refused.json()


async def test_the_route_of_an_embedding_is_explained_too(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        by_task = await served.http.post("/api/v1/route", json={"task": "embedding", "input": ["a", "b"]})
        own_body = await served.http.post("/api/v1/route", json={"model": "vectors", "input": ["a", "b"]})

        for answer in (by_task, own_body):
            said = answer.json()
            assert said["model_id"] == "vectors"
            assert said["candidates"][0]["price"]["reply_length"] == "no reply"


# --- models --------------------------------------------------------------------------------


async def test_models_and_tasks_are_listed(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        models = (await served.http.get("/api/v1/models")).json()["models"]
        tasks = (await served.http.get("/api/v1/tasks")).json()["tasks"]

        assert tasks == list(TASKS)
        assert [(each["model_id"], each["task"]) for each in models] == [
            ("chat", "chat_small"),
            ("eyes", "vision"),
            ("vectors", "embedding"),
        ]
        assert models[1]["supports_vision"] is True
        assert models[2]["dimension"] == 8


async def test_openais_sdk_lists_models_and_retrieves_those_with_slashes(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        listed = [model.id async for model in served.openai.models.list()]
        one = await served.openai.models.retrieve("first/chat")

        assert listed[:6] == ["chat", "first/chat", "eyes", "first/eyes", "vectors", "first/vectors"]
        assert (one.id, one.owned_by) == ("first/chat", "first")


async def test_what_may_be_asked_for_in_place_of_a_model_is_listed_and_retrieved_like_one(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        listed = [model.id async for model in served.openai.models.list() if model.owned_by == "sekha"]
        retrieved = [(await served.openai.models.retrieve(name)).id for name in listed]
        answered = [(await served.chat(model=name)).status_code for name in ("auto", "chat_small", "vision")]
        nobodys = await served.http.get("/v1/models/chat_smart")

        assert listed == retrieved == ["auto", "embedding", "chat_small", "vision"]
        assert answered == [200] * 3
        assert nobodys.status_code == 404


@pytest.mark.parametrize(
    ("may", "listed"),
    [
        ("models: [chat]", ["chat", "first/chat", "auto", "chat_small"]),
        ("models: [first/vectors]", ["vectors", "first/vectors", "embedding"]),
        ("tasks: [vision]", ["eyes", "first/eyes", "auto", "vision"]),
    ],
)
async def test_a_key_is_shown_the_models_that_it_may_use(gateway: Opens, may: str, listed: list[str]) -> None:
    key = new_key()
    keys = f"keys:\n  - {{name: one, hash: '{hash_of(key)}', {may}}}"
    async with StandIn() as standin, gateway(standin, extra=keys, api_key=key) as served:
        served.http.headers["Authorization"] = f"Bearer {key}"
        shown = [model.id async for model in served.openai.models.list()]
        by_task = (await served.http.get("/api/v1/models")).json()["models"]
        each = {name: (await served.http.get(f"/v1/models/{name}")).status_code for name in ("chat", "eyes", "vectors")}

        assert shown == listed
        assert {model["model_id"] for model in by_task} == {listed[0]}
        assert each == {name: 200 if name == listed[0] else 403 for name in each}


async def test_a_model_that_nobody_has_is_404(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        answer = await served.http.get("/v1/models/first/chta")

        assert answer.status_code == 404
        assert "Did you mean 'first/chat'?" in answer.json()["error"]["message"]


# --- searches ------------------------------------------------------------------------------


async def test_what_is_nearest_is_found_first(gateway: Opens) -> None:
    async with StandIn(dimension=8) as standin, gateway(standin, extra=COLLECTIONS) as served:
        await served.serving.runtime.ingest(DOCUMENTS)

        answer = await served.http.post("/api/v1/search", json={"query": "Container ships cross the ocean."})

        said = answer.json()
        assert (answer.status_code, said["collection"]) == (200, "documents")
        assert [each["content"] for each in said["results"]] == [DOCUMENTS[1].text, DOCUMENTS[0].text]
        best = said["results"][0]
        assert best["score"] == pytest.approx(1, abs=1e-5)
        assert (best["dimension"], best["properties"]["source"]) == (8, "ships.md")
        assert len(best["uuid"]) == 36
        assert said["sekha"]["attempts"] == 1
        assert said["sekha"]["cost"] > 0


class Kept:
    """A recorder that wants everything and shows it."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def wants(self, *, outcome: Outcome, seconds: float) -> bool:
        return True

    def record(self, run: Run) -> None:
        self.runs.append(run)

    async def aclose(self) -> None:
        pass


async def test_a_search_is_recorded_as_a_chat_is_and_without_its_question(gateway: Opens) -> None:
    async with StandIn(dimension=8) as standin, gateway(standin, extra=COLLECTIONS) as served:
        await served.serving.runtime.ingest(DOCUMENTS)
        served.serving.recorder = kept = cast("Any", Kept())

        answer = await served.http.post("/api/v1/search", json={"query": "where do cats sleep", "limit": 3})
        await served.http.post("/api/v1/search", json={"query": "where", "collection": "notes"})

        found, missing = kept.runs
        assert (found.flow, found.outcome, found.id) == ("search", "answered", answer.json()["sekha"]["run_id"])
        assert found.name == "documents → first/vectors"
        assert found.parameters["limit"] == 3
        assert (found.steps[0].name, found.steps[-1].name) == ("find_spaces", "merge_found")
        assert (missing.outcome, missing.error) == ("refused", "collection_missing")
        assert "cats sleep" not in repr(found)


@pytest.mark.parametrize("content", [False, True])
async def test_a_key_that_is_sent_as_a_name_is_on_no_record(gateway: Opens, content: bool) -> None:
    extra = COLLECTIONS + "\nrecording: {content: true}" if content else COLLECTIONS
    key = new_key()
    async with StandIn(dimension=8) as standin, gateway(standin, extra=extra) as served:
        served.serving.recorder = kept = cast("Any", Kept())

        messages = [{"role": "user", "content": "Hi"}]
        for path, asked in (
            ("/v1/chat/completions", {"messages": messages, "model": f"at/{key}"}),
            ("/v1/chat/completions", {"messages": messages, "preferred_model": key}),
            ("/v1/embeddings", {"input": "Hi", "model": key}),
        ):
            await served.http.post(path, json=asked)

    assert len(kept.runs) == 3
    assert key.removeprefix("sk-sekha-") not in repr(kept.runs)
    assert kept.runs[0].name == "at/sk-sekha-*** → model_not_found"
    assert kept.runs[0].parameters["model"] == "at/sk-sekha-***"


async def test_a_search_is_narrowed(gateway: Opens) -> None:
    async with StandIn(dimension=8) as standin, gateway(standin, extra=COLLECTIONS) as served:
        await served.serving.runtime.ingest(DOCUMENTS)
        cats = {"property": "source", "operator": "in", "value": ["cats.md", "dogs.md"]}

        async def found(**fields: Any) -> list[str]:
            answer = await served.http.post("/api/v1/search", json={"query": DOCUMENTS[1].text, **fields})
            return [each["properties"]["source"] for each in answer.json()["results"]]

        assert await found(where=cats) == ["cats.md"]
        assert await found(where={"not": cats}) == ["ships.md"]
        assert await found(where={"all": [cats, {"any": []}]}) == []
        assert await found(limit=1) == ["ships.md"]
        assert await found(min_similarity=0.999, dimension=8) == ["ships.md"]


async def test_a_search_of_several_spaces_answers_and_falls_back_only_when_one_of_them_fails(gateway: Opens) -> None:
    async with StandIn(dimension=8) as standin:
        here = "{id: here, provider_type: builtin, models: [{model_id: hashed-16, task: embedding, dimension: 16}]}"
        config = config_for(standin, extra=COLLECTIONS).replace("budgets:", f"  - {here}\nbudgets:")
        async with gateway(config=config.replace("{model: vectors}", "{model: hashed-16}")) as served:
            await served.serving.runtime.ingest(DOCUMENTS[:1])
        async with gateway(config=config) as served:
            await served.serving.runtime.ingest(DOCUMENTS[1:])
            served.serving.recorder = kept = cast("Any", Kept())

            whole = (await served.http.post("/api/v1/search", json={"query": "cats"})).json()
            standin.fail(503)
            part = (await served.http.post("/api/v1/search", json={"query": "cats"})).json()
            served.serving.recorder = None
            metrics = (await served.http.get("/metrics")).text

    assert [run.outcome for run in kept.runs] == ["answered", "fallback"]
    assert ([each["space"] for each in whole["sekha"]["spaces"]], whole["sekha"]["left_out"]) == (
        ["Documents_8", "Documents_16"],
        [],
    )
    assert {each["space"] for each in part["results"]} == {"Documents_16"}
    assert [each["space"] for each in part["sekha"]["left_out"]] == ["Documents_8"]
    assert whole["sekha"]["attempts"] == part["sekha"]["attempts"] == 2
    assert 'provider="here",model="hashed-16",outcome="answered"} 2' in metrics
    assert 'provider="first",model="vectors",outcome="provider_unavailable"} 1' in metrics
    assert 'sekha_tokens_total{provider="here",model="hashed-16",kind="input"} 2' in metrics


async def test_the_collection_that_remembers_is_searched_where_there_is_one(gateway: Opens) -> None:
    async with (
        StandIn(dimension=8) as standin,
        gateway(standin, extra=COLLECTIONS + "memory: {collection: notes}\n") as served,
    ):
        await served.serving.runtime.ingest(DOCUMENTS, "notes")

        answer = await served.http.post("/api/v1/search", json={"query": "cats"})

        assert answer.json()["collection"] == "notes"


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({}, "query"),
        ({"query": " "}, "query"),
        ({"query": 7}, "query"),
        ({"query": "a", "colection": "documents"}, "colection"),
        ({"query": "a", "collection": "../documents"}, "collection"),
        ({"query": "a", "limit": 0}, "limit"),
        ({"query": "a", "limit": True}, "limit"),
        ({"query": "a", "min_similarity": 2}, "min_similarity"),
        ({"query": "a", "max_cost": "1e9"}, "max_cost"),
        ({"query": "a", "dimension": 0}, "dimension"),
        ({"query": "a", "where": []}, "where"),
        ({"query": "a", "where": {"property": "x", "operator": "like", "value": 1}}, "where.operator"),
        ({"query": "a", "where": {"property": "x", "operator": "eq", "value": [1]}}, "where.value"),
        ({"query": "a", "where": {"all": [{"property": "x", "operator": "in", "value": 1}]}}, "where.all[0].value"),
        ({"query": "a", "where": {"all": [], "any": []}}, "where"),
    ],
)
async def test_a_search_that_is_wrong_is_refused_by_its_field(
    gateway: Opens, asked: dict[str, Any], field: str
) -> None:
    async with StandIn(dimension=8) as standin, gateway(standin, extra=COLLECTIONS) as served:
        answer = await served.http.post("/api/v1/search", json=asked)

        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field
        assert standin.requests == []


async def test_a_filter_that_goes_too_deep_is_refused(gateway: Opens) -> None:
    async with StandIn(dimension=8) as standin, gateway(standin, extra=COLLECTIONS) as served:
        where: dict[str, Any] = {"property": "x", "operator": "eq", "value": 1}
        for _ in range(17):
            where = {"not": where}

        answer = await served.http.post("/api/v1/search", json={"query": "a", "where": where})

        assert answer.status_code == 400
        assert "16 levels" in answer.json()["error"]["message"]


async def test_a_collection_that_holds_nothing_is_404(gateway: Opens) -> None:
    async with StandIn(dimension=8) as standin, gateway(standin, extra=COLLECTIONS) as served:
        answer = await served.http.post("/api/v1/search", json={"query": "a"})

        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "collection_missing"


async def test_a_search_counts_against_the_budget_of_its_key(gateway: Opens) -> None:
    key = new_key()
    keys = f'keys: [{{name: poor, hash: "{hash_of(key)}"}}]\n'
    async with StandIn(dimension=8) as standin:
        # A second `budgets:` would be one too many.
        config = config_for(standin, extra=COLLECTIONS + keys).replace(
            "{name: all, limit: 1000}", "{name: poor, limit: 0, match: {key: poor}}"
        )
        async with gateway(config=config) as served:
            await served.serving.runtime.ingest(DOCUMENTS)

            answer = await served.http.post(
                "/api/v1/search", json={"query": "cats"}, headers={"authorization": f"Bearer {key}"}
            )

            assert answer.status_code == 402
            assert answer.json()["error"]["budget"] == "poor"


# --- costs ---------------------------------------------------------------------------------


async def test_costs_are_reported_by_group_against_the_estimate(gateway: Opens) -> None:
    async with StandIn(dimension=8) as first, StandIn(dimension=8) as second, gateway(first, second) as served:
        await served.chat(model="first/chat", metadata={"team": "search", "stage": "live"})
        await served.chat(model="second/chat")
        await served.openai.embeddings.create(model="first/vectors", input="cats")

        providers = (await served.http.get("/api/v1/costs")).json()
        tags = (await served.http.get("/api/v1/costs?by=tag")).json()
        days = (await served.http.get("/api/v1/costs?by=day")).json()

        assert {each["group"]: each["calls"] for each in providers["costs"]} == {"first": 2, "second": 1}
        assert providers["total"]["calls"] == 3
        assert providers["total"]["cost"] == pytest.approx(float(await served.spent()))
        assert providers["total"]["estimated"] > 0
        assert providers["total"]["input_tokens"] > 0
        assert {each["group"] for each in tags["costs"]} == {"team:search", "stage:live", ""}
        assert tags["total"] == days["total"] == providers["total"]
        assert len(days["costs"]) == 1


async def test_costs_are_reported_since_a_day_or_a_time(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        await served.chat()
        now = datetime.now(UTC)

        async def calls(since: str) -> int:
            answer = await served.http.get("/api/v1/costs", params={"since": since})
            return int(answer.json()["total"]["calls"])

        assert [await calls(ago) for ago in ("1h", "7d", "2w")] == [1, 1, 1]
        assert await calls("0h") == 0
        assert await calls((now - timedelta(days=1)).date().isoformat()) == 1
        assert await calls((now - timedelta(minutes=1)).isoformat()) == 1
        assert await calls((now + timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%SZ")) == 0


@pytest.mark.parametrize(
    ("query", "field", "says"),
    [
        ("by=week", "by", "provider, model, task, key, tag, day"),
        ("since=yesterday", "since", "such as 2026-11-23"),
        ("since=0001-01-01T00:00:00%2B14:00", "since", "such as"),
        ("form=2026", "form", "There is no parameter 'form'"),
        ("by=%FF", "by", "provider, model"),
    ],
)
async def test_a_report_that_is_not_kept_is_refused(gateway: Opens, query: str, field: str, says: str) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        answer = await served.http.get(f"/api/v1/costs?{query}")

        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field
        assert says in answer.json()["error"]["message"]
