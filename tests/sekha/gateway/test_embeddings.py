"""Embeddings over HTTP: the provider's own bytes, in whichever form the caller asks for."""

from __future__ import annotations

import httpx
import numpy as np
import openai
import orjson
import pytest

from sekha.breaker import BreakerRules
from sekha.circuits import Circuits
from sekha.errors import ProviderUnavailable
from sekha.testing import StandIn
from tests.fixtures.gateway import Opens, config_for
from tests.fixtures.upstream import Upstream, with_length

# As `cl100k_base` counts, which is taken for a model that nobody knows.
HELLO_THERE = [9906, 1070, 13]
BYE = [1383, 68, 13]


async def test_a_text_becomes_a_vector_and_the_reply_says_of_which_length(gateway: Opens) -> None:
    async with StandIn(dimension=8) as standin, gateway(standin) as served:
        answered = await served.openai.embeddings.with_raw_response.create(model="vectors", input="Hello there.")
        spent, held = await served.spent(), await served.held()

    reply = answered.parse()
    assert [len(item.embedding) for item in reply.data] == [8]
    assert reply.usage.prompt_tokens == 2
    assert reply.model_extra is not None
    assert reply.model_extra["dimension"] == 8
    assert reply.model_extra["sekha"]["cost"] == float(answered.headers["x-sekha-cost"]) == float(spent) == 0.002
    assert (answered.headers["x-sekha-provider"], answered.headers["x-sekha-model"]) == ("first", "vectors")
    assert held == 0


@pytest.mark.parametrize("as_served", [False, True], ids=["line", "short way"])
@pytest.mark.parametrize(
    "reported",
    [{}, {"usage": None}, {"usage": {}}, {"usage": {"prompt_tokens": 0, "total_tokens": 0}}],
    ids=["nothing", "null", "empty", "zeros"],
)
async def test_tokens_that_were_counted_are_the_replys_own_usage(
    gateway: Opens, as_served: bool, reported: dict[str, object]
) -> None:
    data = [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25, 1e-7, 0.1, 1, 0, 0, 0]}]
    answer = orjson.dumps({"object": "list", **reported, "data": data, "model": "usage"})
    async with (
        Upstream(with_length(answer, "Content-Type: application/json")) as upstream,
        gateway(upstream, as_served=as_served) as served,
    ):
        for _ in range(2):
            said = await served.http.post("/v1/embeddings", json={"model": "vectors", "input": "Hello there."})
            parsed = await served.openai.embeddings.create(model="vectors", input="Hi", encoding_format="float")

    reply = said.json()
    assert reply["sekha"]["usage"] == "counted"
    assert (reply["usage"], said.text.count('"usage":{')) == ({"prompt_tokens": 3, "total_tokens": 3}, 1)
    assert reply["data"] == data
    assert parsed.usage.prompt_tokens == 1


async def test_numbers_and_base64_say_the_same(gateway: Opens) -> None:
    async with StandIn(dimension=8) as standin, gateway(standin) as served:
        asked = {"model": "vectors", "input": ["one", "two"]}
        plain = (await served.http.post("/v1/embeddings", json=asked)).json()
        # The SDK asks for base64 by itself, and unpacks it.
        packed = await served.openai.embeddings.create(model="vectors", input=["one", "two"])
        kept = (await served.http.post("/v1/embeddings", json={**asked, "encoding_format": "base64"})).json()
        sent = [each.json.get("encoding_format") for each in standin.requests]

    assert sent == [None, "base64", "base64"]
    assert isinstance(kept["data"][0]["embedding"], str)
    for one, other in zip(plain["data"], packed.data, strict=True):
        assert one["embedding"] == pytest.approx(other.embedding)
        assert np.linalg.norm(one["embedding"]) == pytest.approx(1)


@pytest.mark.parametrize("field", [{"dimensions": 4}, {"foo": 1}])
async def test_what_another_protocol_cannot_heed_is_refused_before_anybody_is_asked(
    gateway: Opens, field: dict[str, int]
) -> None:
    async with StandIn(dimension=8) as standin, gateway(standin, kind="ollama") as served:
        asked = {"model": "vectors", "input": "one", "dimensions": 8, "user": "u-1", **field}
        refused = await served.http.post("/v1/embeddings", json=asked)
        sent, spent = list(standin.requests), await served.spent()
        fits = await served.http.post("/v1/embeddings", json={**asked, "dimensions": 8, "foo": None})

    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "field_unsupported", next(iter(field)))
    assert (sent, spent) == ([], 0)
    assert fits.status_code == 200


def two_protocols(standin: StandIn, *, first: str = "openai", limits: str = "{}") -> str:
    """One model at a provider that goes first, and at an Ollama, whose protocol has no `dimensions`."""
    model = "{model_id: vectors, task: embedding, dimension: 8, same_as: openai/vectors, price: {input_per_million: 1}}"
    url = {"openai": standin.openai_url, "ollama": standin.ollama_url}
    return f"""
providers:
  - {{id: first, provider_type: {first}, base_url: '{url[first]}', priority: 1, limits: {limits}, models: [{model}]}}
  - {{id: second, provider_type: ollama, base_url: '{standin.ollama_url}', priority: 2, models: [{model}]}}
"""


async def test_whoever_is_full_is_waited_for_where_the_others_protocol_lacks_a_field(gateway: Opens) -> None:
    async with (
        StandIn(dimension=8) as standin,
        gateway(config=two_protocols(standin, limits="{requests_per_minute: 1}")) as served,
    ):
        asked = {"model": "vectors", "input": "one", "dimensions": 4}
        first, later = [await served.http.post("/v1/embeddings", json=asked) for _ in range(2)]

    assert (first.status_code, later.status_code, later.json()["error"]["code"]) == (200, 429, "rate_limited")
    assert 1 <= int(later.headers["retry-after"]) <= 61
    assert later.headers["x-should-retry"] == "true"
    assert [attempt["error"] for attempt in later.json()["error"]["attempts"]] == ["field_unsupported"]


async def test_whose_circuit_is_open_is_waited_for_where_the_others_protocol_lacks_a_field(gateway: Opens) -> None:
    circuits = Circuits(BreakerRules(failure_threshold=1, timeout_seconds=30))
    async with StandIn(dimension=8) as standin, gateway(config=two_protocols(standin), circuits=circuits) as served:
        standin.fail(500)
        asked = {"model": "vectors", "input": "one", "dimensions": 4}
        first, later = [await served.http.post("/v1/embeddings", json=asked) for _ in range(2)]

    assert (first.status_code, later.status_code, later.json()["error"]["code"]) == (503, 503, "circuit_open")
    assert 1 <= int(later.headers["retry-after"]) <= 30


@pytest.mark.parametrize("full", [{"first": "ollama"}, {"limits": "{tokens_per_minute: 1}"}], ids=["protocol", "ever"])
async def test_nobody_is_waited_for_who_could_not_serve_it_later_either(gateway: Opens, full: dict[str, str]) -> None:
    circuits = Circuits(BreakerRules(failure_threshold=1, timeout_seconds=30))
    if "first" in full:
        circuits.note("first/vectors", ProviderUnavailable(provider_id="first"))
    async with (
        StandIn(dimension=8) as standin,
        gateway(config=two_protocols(standin, **full), circuits=circuits) as served,
    ):
        asked = {"model": "vectors", "input": "one or two", "dimensions": 4}
        refused = await served.http.post("/v1/embeddings", json=asked)

    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "field_unsupported")


async def test_what_is_never_sent_takes_nothing_of_a_providers_limits(gateway: Opens) -> None:
    asked = {"model": "first/vectors", "input": "one"}
    async with (
        StandIn(dimension=8) as standin,
        gateway(config=two_protocols(standin, first="ollama", limits="{requests_per_minute: 3}")) as served,
    ):
        unsent = [await served.http.post("/v1/embeddings", json={**asked, "dimensions": 5}) for _ in range(3)]
        sent = [await served.http.post("/v1/embeddings", json=asked) for _ in range(4)]

    assert [answer.status_code for answer in (*unsent, *sent)] == [400, 400, 400, 200, 200, 200, 429]


async def test_very_many_texts_are_shortened_by_who_can(gateway: Opens) -> None:
    async with StandIn(dimension=8) as standin, gateway(standin) as served:
        asked = {"model": "vectors", "input": ["one"] * 600}
        plain = await served.http.post("/v1/embeddings", json=asked)
        sizes = [len(each.json["input"]) for each in standin.requests]
        short = await served.http.post("/v1/embeddings", json={**asked, "dimensions": 4})

    assert (plain.json()["dimension"], sorted(sizes)) == (8, [88, 512])
    assert (short.json()["dimension"], len(short.json()["data"])) == (4, 600)


async def test_very_many_texts_have_the_length_that_is_asked_for_though_the_file_declares_the_same(
    gateway: Opens,
) -> None:
    async with StandIn(dimension=16) as standin, gateway(standin) as served:
        asked = {"model": "vectors", "input": ["one"] * 600, "dimensions": 8}
        answered = await served.http.post("/v1/embeddings", json=asked)
        sent = sorted((len(each.json["input"]), each.json["dimensions"]) for each in standin.requests)

    assert (answered.status_code, sent) == (200, [(88, 8), (512, 8)])
    assert (answered.json()["dimension"], len(answered.json()["data"])) == (8, 600)


async def test_dimensions_and_user_reach_the_provider(gateway: Opens) -> None:
    async with StandIn(dimension=8) as standin, gateway(standin) as served:
        reply = await served.openai.embeddings.create(
            model="vectors", input="one", dimensions=4, user="u-1", extra_body={"metadata": {"team": "search"}}
        )
        sent = standin.requests[-1].json

    assert len(reply.data[0].embedding) == 4
    assert (sent["dimensions"], sent["user"]) == (4, "u-1")
    assert "metadata" not in sent


async def test_tokens_are_embedded_as_the_texts_that_they_stand_for(gateway: Opens) -> None:
    async with StandIn(dimension=8) as standin, gateway(standin) as served:
        one = await served.openai.embeddings.create(model="vectors", input=HELLO_THERE)
        two = await served.openai.embeddings.create(model="vectors", input=[HELLO_THERE, BYE])
        words = await served.openai.embeddings.create(model="vectors", input="Hello there.")

    assert len(one.data) == 1
    assert len(two.data) == 2
    assert one.data[0].embedding == two.data[0].embedding == words.data[0].embedding


@pytest.mark.parametrize("kind", ["openai", "ollama", "openrouter"])
async def test_every_protocol_embeds_in_openais_shape(gateway: Opens, kind: str) -> None:
    async with StandIn(dimension=8) as standin, gateway(config=config_for(standin, kind=kind)) as served:
        reply = await served.openai.embeddings.create(model="vectors", input=["one", "two"])
        plain = await served.http.post("/v1/embeddings", json={"input": ["one", "two"]})

    assert [(item.index, len(item.embedding)) for item in reply.data] == [(0, 8), (1, 8)]
    assert [len(item["embedding"]) for item in plain.json()["data"]] == [8, 8]


async def test_many_texts_are_split_and_come_back_in_their_order(gateway: Opens) -> None:
    texts = [f"text {number}" for number in range(600)]
    async with StandIn(dimension=8) as standin, gateway(standin) as served:
        reply = await served.openai.embeddings.create(model="vectors", input=texts)
        alone = await served.openai.embeddings.create(model="vectors", input=texts[599])
        asked = len(standin.requests)

    assert asked == 3
    assert [item.index for item in reply.data] == list(range(600))
    assert reply.data[599].embedding == pytest.approx(alone.data[0].embedding, abs=1e-6)


async def test_another_provider_of_the_model_is_asked_when_one_fails(gateway: Opens) -> None:
    async with StandIn(dimension=8) as one, StandIn(dimension=8) as two, gateway(one, two) as served:
        one.fail(500)
        answered = await served.openai.embeddings.with_raw_response.create(model="vectors", input="one")

    assert answered.headers["x-sekha-provider"] == "second"


@pytest.mark.parametrize("kind", ["openai", "ollama"])
async def test_a_blank_text_is_embedded_as_any_other(gateway: Opens, kind: str) -> None:
    async with StandIn(dimension=8) as standin, gateway(standin, kind=kind) as served:
        reply = await served.openai.embeddings.create(model="vectors", input=["one", " ", "\n"])

    assert [len(item.embedding) for item in reply.data] == [8, 8, 8]


async def test_vectors_of_another_length_are_no_answer(gateway: Opens) -> None:
    async with StandIn(dimension=8) as one, StandIn(dimension=8) as two, gateway(one, two) as served:
        one.wrong_dimension(5)
        with pytest.raises(openai.InternalServerError) as caught:
            await served.openai.embeddings.create(model="vectors", input="one")

    assert (caught.value.status_code, caught.value.code) == (502, "dimension_mismatch")
    assert not two.requests


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input[0]"),
        ({"input": ["one", 2]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": ["one"] * 2049}, "input"),
        ({"input": {"text": "one"}}, "input"),
        ({"input": "one", "dimensions": 0}, "dimensions"),
        ({"input": "one", "dimensions": "8"}, "dimensions"),
        ({"input": "one", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "one", "model": 5}, "model"),
        ({"input": "one", "max_cost": "much"}, "max_cost"),
        ({"input": "one", "metadata": [1]}, "metadata"),
    ],
)
async def test_what_cannot_be_embedded_is_refused_by_its_field(
    gateway: Opens, asked: dict[str, object], field: str
) -> None:
    async with StandIn(dimension=8) as standin, gateway(standin) as served:
        response = await served.http.post("/v1/embeddings", json=asked)

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] in (field, f"{field}[0]")
    assert not standin.requests


# --- models --------------------------------------------------------------------------------


async def test_models_are_listed_by_both_of_their_names(gateway: Opens) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two) as served:
        models = [model.id async for model in served.openai.models.list()]

    assert {"chat", "first/chat", "second/chat", "vectors"} <= set(models)
    assert len(models) == len(set(models))


@pytest.mark.parametrize("name", ["chat", "second/chat"])
async def test_one_model_is_looked_up_by_name(gateway: Opens, name: str) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two) as served:
        model = await served.openai.models.retrieve(name)

    assert model.id == name
    assert model.owned_by == ("second" if "/" in name else "first")


async def test_a_model_that_is_not_there_is_not_found(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        with pytest.raises(openai.NotFoundError, match="Did you mean 'chat'"):
            await served.openai.models.retrieve("chatt")


async def test_the_task_of_an_embedding_is_looked_at(gateway: Opens) -> None:
    async with StandIn(dimension=8) as standin, gateway(standin) as served:

        async def embed(task: str) -> httpx.Response:
            return await served.http.post("/v1/embeddings", json={"input": "a", "task": task})

        embedded, chat, unknown = [await embed(task) for task in ("embedding", "chat_small", "nope")]

    assert embedded.status_code == 200
    assert (chat.status_code, chat.json()["error"]["param"]) == (400, "task")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert "'nope'" in unknown.json()["error"]["message"]
