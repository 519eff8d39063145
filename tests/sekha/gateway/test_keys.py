"""Keys: made once, kept as hashes, asked for on every page that costs or tells, and shown nowhere."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import struct
from typing import Any

import pytest

from sekha.errors import KeyLimited, Unauthenticated
from sekha.gateway.app import ROUTES
from sekha.keys import Key, Keyring, hash_of, new_key
from sekha.rates import Minutes
from sekha.testing import StandIn
from tests.fixtures.gateway import Opens

OPEN = {
    "/health",
    "/health/live",
    "/health/ready",
    "/api/v1/health",
    "/api/v1/health/providers",
    "/docs",
    "/openapi.json",
}
"""What load balancers and browsers ask for, who have no key."""


def test_a_key_is_long_by_chance_and_known_by_its_hash() -> None:
    keys = {new_key() for _ in range(100)}

    assert len(keys) == 100
    assert all(key.startswith("sk-sekha-") and len(key) >= 50 for key in keys)
    assert all(key not in hash_of(key) for key in keys)


def test_a_key_belongs_to_whom_it_was_given() -> None:
    one, other = new_key(), new_key()
    ring = Keyring([Key(name="one", hash=hash_of(one)), Key(name="other", hash=hash_of(other))])

    found = [ring.owner(b"%b %b" % (scheme, other.encode())) for scheme in (b"Bearer", b"bearer", b"BEARER ")]

    assert [key.name for key in found if key] == ["other"] * 3
    assert ring


@pytest.mark.parametrize(
    "header", [None, b"", b"Bearer", b"Basic eDp5", b"Bearer ", b"Bearer \xff\xfe", b"bearer sk-x"]
)
def test_anything_else_is_refused(header: bytes | None) -> None:
    ring = Keyring([Key(name="one", hash=hash_of(new_key()))])

    with pytest.raises(Unauthenticated) as caught:
        ring.owner(header)

    assert "sk-x" not in str(caught.value)


def test_without_keys_everybody_is_let_in() -> None:
    assert Keyring([]).owner(None) is None
    assert Keyring([]).owner(b"Bearer whatever") is None
    assert not Keyring([])


async def test_every_page_that_costs_or_tells_asks_for_a_key(gateway: Opens) -> None:
    key = new_key()
    async with StandIn() as standin, gateway(standin, extra=_keys(key)) as served:
        statuses = {
            (method, path): (await served.http.request(method, path.replace("{model}", "chat"))).status_code
            for path, methods in ROUTES.items()
            for method in methods
            if path not in OPEN
        }

    assert statuses
    assert set(statuses.values()) == {401}, statuses
    assert not standin.requests


async def test_no_key_is_asked_for_where_nothing_is_told(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin, extra=_keys(new_key())) as served:
        said = {path: await served.http.get(path, follow_redirects=True) for path in sorted(OPEN & ROUTES.keys())}

    assert {path: response.status_code for path, response in said.items()} == dict.fromkeys(said, 200)


async def test_a_key_is_asked_for_before_the_body_is_read(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin, extra=_keys(new_key())) as served:
        raw = await served.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n", whole=False
        )

    assert raw.startswith(b"HTTP/1.1 401 ")


async def test_neither_key_nor_prompt_is_logged_whatever_happens(
    gateway: Opens, caplog: pytest.LogCaptureFixture
) -> None:
    key, stranger, prompt = new_key(), new_key(), "paint the boats blue"
    caplog.set_level(logging.DEBUG)
    # What a client logs of its own requests is its own.
    for name in ("httpx", "httpcore", "openai", "asyncio"):
        caplog.set_level(logging.WARNING, name)
    async with StandIn() as standin, gateway(standin, extra=_keys(key), timeout_secs=0.3) as served:
        served.http.headers["Authorization"] = f"Bearer {key}"
        await served.chat(prompt, model="chat")
        for fault in (standin.fail, standin.hang, standin.garbage, standin.refuse_content, standin.drop):
            fault()
            await served.chat(prompt, model="chat")
        standin.fail(400, message=f"You sent {prompt!r}.")
        _, refused = await served.stream(prompt, model="chat")
        standin.fail_within(f"You sent {prompt!r}.")
        _, broken = await served.stream(prompt, model="chat")
        no_json = (await served.http.post("/v1/chat/completions", content=prompt.encode())).text
        metrics = (await served.http.get("/metrics")).text
        strange = (await served.http.get("/v1/models", headers={"Authorization": f"Bearer {stranger}"})).text

    said = caplog.text + refused + broken.rpartition('"error"')[2] + no_json + metrics + strange
    assert len(standin.requests) >= 8
    assert caplog.records
    assert not [secret for secret in (key, stranger, prompt) if secret in said]


def _keys(key: str) -> str:
    return f"keys:\n  - {{name: research, hash: '{hash_of(key)}'}}"


async def test_a_key_is_told_what_it_may_not_use(gateway: Opens) -> None:
    key = new_key()
    allowed = f"keys:\n  - {{name: research, hash: '{hash_of(key)}', models: [chat]}}"
    async with StandIn() as standin, gateway(standin, extra=allowed) as served:
        served.http.headers["Authorization"] = f"Bearer {key}"

        answered = await served.chat(model="chat")
        refused = await served.http.post("/v1/embeddings", json={"input": "x", "model": "vectors"})
        automatic = await served.chat(model="auto")
        routed = (await served.http.post("/api/v1/route", json={"model": "auto", "messages": []})).json()

    assert answered.status_code == automatic.status_code == 200
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "key_not_allowed"
    assert "'vectors'" in refused.json()["error"]["message"]
    assert automatic.json()["sekha"]["model_id"] == "chat"
    assert [each["model_id"] for each in routed.get("candidates", []) if each.get("kept")] in ([], ["chat"])


async def test_a_key_is_told_its_tasks_where_those_keep_it_from_a_model_that_it_names(gateway: Opens) -> None:
    key = new_key()
    allowed = (
        f"keys:\n  - {{name: research, hash: '{hash_of(key)}', models: [chat, eyes], tasks: [chat_small, embedding]}}"
    )
    async with StandIn() as standin, gateway(standin, extra=allowed) as served:
        served.http.headers["Authorization"] = f"Bearer {key}"
        other_task, no_name = [await served.chat(model=model) for model in ("eyes", "vectors")]

    assert "may not use 'eyes', but chat_small, embedding:" in other_task.json()["error"]["message"]
    assert "may not use 'vectors', but chat, eyes:" in no_name.json()["error"]["message"]


async def test_a_key_may_be_kept_to_tasks(gateway: Opens) -> None:
    key = new_key()
    allowed = f"keys:\n  - {{name: research, hash: '{hash_of(key)}', tasks: [embedding]}}"
    async with StandIn(dimension=8) as standin, gateway(standin, extra=allowed) as served:
        served.http.headers["Authorization"] = f"Bearer {key}"

        embedded = await served.http.post("/v1/embeddings", json={"input": "x", "model": "vectors"})
        chatted = await served.chat(model="chat")
        by_task = await served.chat(model="chat_small")

    assert embedded.status_code == 200
    assert chatted.status_code == by_task.status_code == 403
    assert len(standin.requests) == 1


_BOTH = """
providers:
  - id: one
    provider_type: openai
    base_url: {url}
    models:
      - {{model_id: m1, task: chat_small, context_window: 9000, price: free}}
      - {{model_id: m1, task: vision}}
keys:
  - {{name: small, hash: "{hash}", tasks: [chat_small]}}
"""


async def test_a_key_spends_only_as_the_tasks_that_it_may_use(gateway: Opens) -> None:
    key = new_key()
    seen = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://pictures.test/1"}}]}]
    async with StandIn() as standin:
        config = _BOTH.format(url=standin.openai_url, hash=hash_of(key))
        async with gateway(standin, config=config) as served:
            served.http.headers["Authorization"] = f"Bearer {key}"

            asked: list[dict[str, Any]] = [
                {"model": "m1", "messages": seen},
                {"messages": seen},
                {"model": "auto", "require_vision": True},
                {"task": "vision"},
            ]
            refused = [await served.chat(**each) for each in asked]
            routed = [await served.http.post("/api/v1/route", json=each) for each in asked]
            named = await served.chat(model="m1")
            as_task = await served.chat(model="chat_small", messages=seen)
            costs = (await served.http.get("/api/v1/costs?by=task")).json()

    said = "Key 'small' may not use 'vision', but chat_small: that is set under `keys:` in sekha.yaml."
    assert [each.status_code for each in refused] == [403] * len(asked)
    assert {each.json()["error"]["message"] for each in (*refused, *routed)} == {said}
    assert named.status_code == as_task.status_code == 200
    assert len(standin.requests) == 2
    assert "vision" not in json.dumps(costs)


async def test_where_a_key_is_an_operators_what_operators_look_at_is_for_those_alone(gateway: Opens) -> None:
    operator, caller = new_key(), new_key()
    keys = (
        f"keys:\n  - {{name: boss, hash: '{hash_of(operator)}', operator: true}}\n"
        f"  - {{name: research, hash: '{hash_of(caller)}'}}"
    )
    pages = ("/metrics", "/api/v1/costs")
    healths = ("/api/v1/health", "/api/v1/health/providers")
    async with StandIn() as standin, gateway(standin, extra=keys) as served:
        said = {
            name: [await served.http.get(page, headers={"Authorization": f"Bearer {key}"}) for page in pages + healths]
            for name, key in (("boss", operator), ("research", caller))
        }
        to_nobody = [(await served.http.get(page)).json() for page in healths]
        served.http.headers["Authorization"] = f"Bearer {caller}"
        answered = await served.chat(model="chat")

    assert [each.status_code for each in said["boss"]] == [200] * 4
    assert "providers" in said["boss"][-1].json()
    assert [each.status_code for each in said["research"]] == [403, 403, 200, 200]
    assert [each.json() for each in said["research"][2:]] == to_nobody
    assert said["research"][0].json()["error"]["code"] == "operators_only"
    assert "boss" not in said["research"][0].text
    assert answered.status_code == 200


async def test_where_no_key_is_an_operators_each_may_look(gateway: Opens) -> None:
    key = new_key()
    async with StandIn() as standin, gateway(standin, extra=_keys(key)) as served:
        served.http.headers["Authorization"] = f"Bearer {key}"

        said = [await served.http.get(page) for page in ("/metrics", "/api/v1/costs", "/api/v1/health/providers")]

    assert [each.status_code for each in said] == [200] * 3
    assert "providers" in said[-1].json()


async def test_a_key_has_so_many_requests_a_minute(gateway: Opens) -> None:
    key = new_key()
    limited = f"keys:\n  - {{name: research, hash: '{hash_of(key)}', requests_per_minute: 3}}"
    async with StandIn() as standin, gateway(standin, extra=limited) as served:
        served.http.headers["Authorization"] = f"Bearer {key}"

        answers = [await served.chat(model="chat") for _ in range(5)]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert 0 < int(answers[-1].headers["retry-after"]) <= 61
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert len(standin.requests) == 3


def test_tokens_count_as_they_were_used() -> None:
    now = 100.0
    key = new_key()
    ring = Keyring([Key(name="one", hash=hash_of(key), tokens_per_minute=100)], clock=lambda: now)
    header = b"Bearer " + key.encode()

    ring.admit(header, tokens=10).used(95)

    with pytest.raises(KeyLimited) as caught:
        ring.admit(header, tokens=10)
    assert 0 < caught.value.retry_after_seconds <= 61
    now = 161.5
    ring.admit(header, tokens=10)


def _limited(key: str, tokens: int) -> str:
    return f"keys:\n  - {{name: research, hash: '{hash_of(key)}', tokens_per_minute: {tokens}}}"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_served", [False, True])
async def test_requests_at_once_take_what_their_replies_may(gateway: Opens, as_served: bool, stream: bool) -> None:
    key = new_key()
    async with StandIn() as standin, gateway(standin, as_served=as_served, extra=_limited(key, 1000)) as served:
        served.http.headers["Authorization"] = f"Bearer {key}"
        first = await served.chat(model="chat")  # the short way is known from here on, where there is one
        standin.slow(0.3, times=None)

        answers = await asyncio.gather(*(served.chat(model="chat", max_tokens=400, stream=stream) for _ in range(6)))
        # Once they are answered it counts what they had.
        later = await served.chat(model="chat", max_tokens=400, stream=stream)

    assert sorted(answer.status_code for answer in (first, *answers)) == [200, 200, 200, 429, 429, 429, 429]
    assert later.status_code == 200
    assert len(standin.requests) == 4


@pytest.mark.parametrize("as_served", [False, True])
async def test_a_reply_whose_length_nobody_limits_is_taken_for_a_usual_one(gateway: Opens, as_served: bool) -> None:
    key = new_key()
    async with StandIn() as standin, gateway(standin, as_served=as_served, extra=_limited(key, 300)) as served:
        served.http.headers["Authorization"] = f"Bearer {key}"
        first = await served.chat(model="chat")
        standin.slow(0.3, times=None)

        answers = await asyncio.gather(*(served.chat(model="chat") for _ in range(3)))

    # A guess keeps nobody out by itself: the first found a minute in which nothing had passed.
    assert first.status_code == 200
    assert sorted(answer.status_code for answer in answers) in ([200, 429, 429], [429, 429, 429])


@pytest.mark.parametrize("as_served", [False, True])
async def test_a_request_that_failed_counts_where_it_may_be_billed(gateway: Opens, as_served: bool) -> None:
    key = new_key()
    async with (
        StandIn() as first,
        StandIn() as second,
        gateway(first, second, as_served=as_served, extra=_limited(key, 1000)) as served,
    ):
        served.http.headers["Authorization"] = f"Bearer {key}"
        first.fail(400)
        refused = await served.chat(model="chat", max_tokens=600)
        first.garbage(times=None)
        second.fail(400, times=None)

        billed = [await served.chat(model="chat", max_tokens=600) for _ in range(2)]

    assert [answer.status_code for answer in (refused, *billed)] == [400, 400, 429]


async def test_the_data_of_images_and_files_are_no_tokens(gateway: Opens) -> None:
    key = new_key()
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 512, 512) + bytes(1_000_000)
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    pdf = {
        "type": "file",
        "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64," + "QUJD" * 250_000},
    }
    async with StandIn() as standin, gateway(standin, extra=_limited(key, 10_000)) as served:
        served.http.headers["Authorization"] = f"Bearer {key}"
        text = {"type": "text", "text": "What is it?"}
        image = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}

        seen = await served.chat(model="eyes", messages=[{"role": "user", "content": [text, image]}])
        read = await served.chat(model="chat", messages=[{"role": "user", "content": [text, pdf]}])

    assert seen.status_code == 200, seen.text
    assert read.json()["error"]["code"] == "price_unknown"  # let in, and as a matter of money refused


@pytest.mark.parametrize("as_served", [False, True])
@pytest.mark.parametrize(
    ("text", "fields", "tokens"),
    [
        ("word " * 3000, {}, "3,00"),
        ("Hello there.", {"max_tokens": 5000}, "5,0"),
        ("Hi.", {"max_tokens": 500, "n": 3}, "1,5"),
    ],
)
async def test_what_never_passes_is_told_so_and_not_to_try_again(
    gateway: Opens, as_served: bool, text: str, fields: dict[str, int], tokens: str
) -> None:
    key = new_key()
    async with StandIn() as standin, gateway(standin, as_served=as_served, extra=_limited(key, 1000)) as served:
        served.http.headers["Authorization"] = f"Bearer {key}"
        first = await served.chat(model="chat")
        refused = await served.chat(text, model="chat", **fields)
        again = await served.chat(model="chat")

    assert first.status_code == again.status_code == 200
    assert refused.status_code == 413
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers
    error = refused.json()["error"]
    assert error["code"] == "too_many_tokens"
    assert error["message"].startswith(f"The request may take {tokens}")
    assert "key 'research' never has more than 1,000 in a minute" in error["message"]
    assert len(standin.requests) == 2


async def test_a_body_that_is_long_by_its_escapes_alone_is_let_in(gateway: Opens) -> None:
    key = new_key()
    said = {"model": "chat", "max_tokens": 10, "messages": [{"role": "user", "content": "слово " * 140}]}
    async with StandIn() as standin, gateway(standin, extra=_limited(key, 1000)) as served:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        body = json.dumps(said, ensure_ascii=True)
        answered = await served.http.post("/v1/chat/completions", content=body, headers=headers)

    assert len(body) > 4_000
    assert answered.status_code == 200


async def test_texts_to_embed_that_never_pass_are_told_so(gateway: Opens) -> None:
    key = new_key()
    async with StandIn(dimension=8) as standin, gateway(standin, extra=_limited(key, 1000)) as served:
        served.http.headers["Authorization"] = f"Bearer {key}"
        refused = await served.http.post("/v1/embeddings", json={"input": "word " * 3000, "model": "vectors"})
        answered = await served.http.post("/v1/embeddings", json={"input": "word", "model": "vectors"})

    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "too_many_tokens")
    assert answered.status_code == 200


async def test_a_request_that_fails_takes_no_tokens_of_its_keys(gateway: Opens) -> None:
    key = new_key()
    async with StandIn() as standin, gateway(standin, extra=_limited(key, 1000)) as served:
        served.http.headers["Authorization"] = f"Bearer {key}"
        standin.fail(500, times=3)
        answers = [await served.chat(model="chat", max_tokens=900) for _ in range(4)]

    assert [answer.status_code for answer in answers] == [503, 503, 503, 200]


def test_what_a_key_used_counts_under_the_next_configuration_too() -> None:
    key, minutes = new_key(), Minutes()
    header = b"Bearer " + key.encode()

    def ring(requests: int) -> Keyring:
        keys = [Key(name="one", hash=hash_of(key), requests_per_minute=requests)]
        return Keyring(keys, clock=lambda: 100.0, minutes=minutes)

    ring(2).admit(header, tokens=1)
    ring(2).admit(header, tokens=1)

    with pytest.raises(KeyLimited):
        ring(2).admit(header, tokens=1)
    ring(3).admit(header, tokens=1)
