"""Of what is to be remembered, whatever can be kept is kept, and nobody pays for a vector twice."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from sekha.embedding import Embedded, EmbedRequest
from sekha.errors import (
    BudgetExceeded,
    ContentRefused,
    NoCandidate,
    ProviderUnavailable,
    SekhaError,
    StoreUnavailable,
)
from sekha.indexes import Indexes
from sekha.ledger import Scope
from sekha.loading import load
from sekha.memo import Memo, answer_in, decode, encode, streamed_in
from sekha.memory import Memory
from sekha.outbox import Item
from sekha.price_map import PriceMap
from sekha.pricing import Usage
from sekha.providers.builtin import hashed_embeddings
from sekha.registry import Registry
from sekha.vectors.embedded import EmbeddedStore

CONFIG = """
providers:
  - {id: local, provider_type: builtin, models: [{model_id: hashed-16, task: embedding, dimension: 16}]}
  - id: far
    provider_type: ollama
    models: [{model_id: one, task: embedding, dimension: 32}, {model_id: two, task: embedding, dimension: 32}]
"""


class Embedder:
    """Embeds, but for what it is told to fail at."""

    def __init__(self) -> None:
        self.asked: list[EmbedRequest] = []
        self.error: Callable[[EmbedRequest], SekhaError | None] = lambda _: None

    async def __call__(self, request: EmbedRequest) -> Embedded:
        self.asked.append(request)
        if (error := self.error(request)) is not None:
            raise error
        return Embedded(
            vectors=hashed_embeddings(request.texts, 16),
            provider_id="local",
            model_id="hashed-16",
            usage=Usage(),
            estimated_cost=Decimal(0),
            cost=Decimal(0),
            attempts=(),
            charged_to=Scope(),
        )


def refuses(word: str, error: SekhaError) -> Callable[[EmbedRequest], SekhaError | None]:
    return lambda request: error if any(word in text for text in request.texts) else None


@pytest.fixture
def embedder() -> Embedder:
    return Embedder()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    async with EmbeddedStore.open(tmp_path / "vectors.db") as opened:
        yield opened


@pytest.fixture
def memory(tmp_path: Path, embedder: Embedder, store: EmbeddedStore) -> Memory:
    file = tmp_path / "sekha.yaml"
    file.write_text(CONFIG)
    registry = Registry.from_config(load(file, environ={}).config, PriceMap.bundled())

    async def opened() -> EmbeddedStore:
        return store

    return Memory(registry, "conversations", store=opened, indexes=Indexes(opened, now=time.monotonic), embed=embedder)


def chat(question: str, *, key: str | None = None, collection: str | None = None, said: bytes = b"") -> Memo:
    return Memo(
        id=f"run-{question!a}",
        kind="chat",
        at=1e9,
        provider_id="a",
        model_id="b",
        collection=collection,
        key=key,
        texts=(question,) if said else (question, "Yes."),
        said=said,
    )


def vectors(
    *texts: str,
    said: object,
    provider_id: str = "local",
    model_id: str = "hashed-16",
    collection: str | None = None,
) -> Memo:
    return Memo(
        id=f"run of {texts}",
        kind="embedding",
        at=1e9,
        provider_id=provider_id,
        model_id=model_id,
        collection=collection,
        texts=texts,
        said=orjson.dumps(said),
    )


async def questions(store: EmbeddedStore, space: str = "Conversations_16") -> Counter[str]:
    return Counter([record.text.splitlines()[0] async for page in store.scan(space) for record in page])


def names(memos: Sequence[Memo]) -> list[str]:
    return [memo.texts[0] for memo in memos]


async def test_what_is_delivered_again_is_neither_doubled_nor_paid_for(
    memory: Memory, embedder: Embedder, store: EmbeddedStore
) -> None:
    await memory.keep([chat("One.")])
    again = await memory.keep([chat("One."), chat("Two.")])

    assert again.kept == 2
    assert await questions(store) == Counter(["User: One.", "User: Two."])
    assert [request.texts for request in embedder.asked] == [
        ("User: One.\n\nAssistant: Yes.",),
        ("User: Two.\n\nAssistant: Yes.",),
    ]


async def test_each_is_kept_in_the_collection_that_it_names(memory: Memory, store: EmbeddedStore) -> None:
    said = {"data": [{"embedding": [0.5] * 16}]}
    before_they_named_one = decode(Item(encode(chat("Old.")).head.replace(b'"collection":null,', b"")))

    result = await memory.keep(
        [
            before_they_named_one,
            chat("There.", collection="notes"),
            chat("Here.", collection="conversations"),
            vectors("A vector.", said=said, collection="notes"),
        ]
    )

    assert result.kept == 4
    assert await questions(store) == Counter(["User: Old.", "User: Here."])
    assert await questions(store, "Notes_16") == Counter(["User: There.", "A vector."])


async def test_each_payer_is_embedded_for_apart(memory: Memory, embedder: Embedder) -> None:
    result = await memory.keep([chat("One.", key="ann"), chat("Two.", key="bob"), chat("Three.", key="ann")])

    assert result.kept == 3
    assert {request.key: len(request.texts) for request in embedder.asked} == {"ann": 2, "bob": 1}


async def test_a_payer_without_money_keeps_nobody_else_waiting(memory: Memory, embedder: Embedder) -> None:
    spent = BudgetExceeded("ann", limit=Decimal(1), remaining=Decimal(0), needed=Decimal(1), period="day", resets=None)
    embedder.error = lambda request: spent if request.key == "ann" else None

    result = await memory.keep([chat("One.", key="ann"), chat("Two.", key="bob")])

    assert result.kept == 1
    assert names(result.parked) == ["One."]
    assert result.why_parked is spent


async def test_one_that_is_refused_among_many_is_found(
    memory: Memory, embedder: Embedder, store: EmbeddedStore
) -> None:
    embedder.error = refuses("bad", ContentRefused(provider_id="local"))

    result = await memory.keep([chat(f"Number {at}.") for at in range(40)] + [chat("A bad one.")])

    assert result.kept == 40
    assert [(failed.memo.texts[0], failed.error) for failed in result.failed] == [("A bad one.", "content_refused")]
    assert result.waiting == []
    assert sum((await questions(store)).values()) == 40


async def test_while_nobody_embeds_only_one_call_is_wasted(memory: Memory, embedder: Embedder) -> None:
    embedder.error = refuses("", ProviderUnavailable(provider_id="local"))

    result = await memory.keep([chat(f"Number {at}.") for at in range(200)])

    assert len(embedder.asked) == 1
    assert len(result.waiting) == 200
    assert result.why is not None
    assert result.why.code == "provider_unavailable"


async def test_one_by_one_the_one_that_always_fails_waits_alone(memory: Memory, embedder: Embedder) -> None:
    embedder.error = refuses("poison", ProviderUnavailable(provider_id="local"))

    result = await memory.keep([chat("One."), chat("A poison."), chat("Two.")], one_by_one=True)

    assert result.kept == 2
    assert names(result.waiting) == ["A poison."]


async def test_what_no_model_has_room_for_is_cut_until_one_has(
    memory: Memory, embedder: Embedder, store: EmbeddedStore
) -> None:
    too_long = NoCandidate("embedding", [("local/hashed-16", "its context window")])
    embedder.error = lambda request: too_long if len(request.texts[0]) > 400 else None

    result = await memory.keep([chat("A word. " * 200)])
    pages = store.scan("Conversations_16")
    [record] = [record async for page in pages for record in page]

    assert result.kept == 1
    assert 200 <= len(record.text) <= 400
    assert record.properties["cut"] is True


async def test_what_nobody_may_embed_waits_for_another_configuration(memory: Memory, embedder: Embedder) -> None:
    embedder.error = refuses("", NoCandidate("embedding", [("local/hashed-16", "its price is unknown")]))

    result = await memory.keep([chat("A word. " * 200), chat("Short.")])

    assert len(result.waiting) == 2
    assert result.failed == []


@pytest.mark.parametrize(
    "said",
    [
        [],
        {"data": None},
        {"data": [{"embedding": [0.1] * 16}]},
        {"data": [{"embedding": [0.1] * 16}, {"embedding": [0.1] * 15}]},
        {"data": [{"embedding": "!"}, {"embedding": "!"}]},
        {"data": [{"embedding": [0.1] * 16}, 7]},
    ],
)
async def test_what_is_no_list_of_vectors_is_given_up(memory: Memory, said: object) -> None:
    result = await memory.keep([vectors("One.", "Two.", said=said)])

    assert [failed.error for failed in result.failed] == ["provider_bad_reply"]


async def test_a_vector_that_no_index_takes_is_given_up_and_its_neighbours_are_kept(
    memory: Memory, store: EmbeddedStore
) -> None:
    good, zero = {"data": [{"embedding": [0.5] * 16}]}, {"data": [{"embedding": [0.0] * 16}]}

    result = await memory.keep([vectors("Good.", said=good), vectors("Zero.", said=zero)])

    assert result.kept == 1
    assert [(failed.memo.texts, failed.error) for failed in result.failed] == [(("Zero.",), "vector_refused")]
    assert await questions(store) == Counter(["Good."])


async def test_two_models_of_one_length_have_an_index_each(memory: Memory, store: EmbeddedStore) -> None:
    said = {"data": [{"embedding": [0.5] * 32}]}
    memos = [vectors(f"By {name}.", said=said, provider_id="far", model_id=name) for name in ("one", "two", "one")]

    result = await memory.keep(memos)

    assert (result.kept, result.left_out) == (3, 0)
    assert await questions(store, "Conversations_32") == Counter({"By one.": 1})
    assert await questions(store, "Conversations_32_two") == Counter({"By two.": 1})


async def test_vectors_are_told_apart_by_their_index(memory: Memory, store: EmbeddedStore) -> None:
    one, two = np.eye(16)[:2].tolist()
    said = {"data": [{"index": 1, "embedding": two}, {"index": 0, "embedding": one}]}

    await memory.keep([vectors("One.", "Two.", said=said)])
    [first] = await store.search("Conversations_16", np.eye(16, dtype=np.float32)[0], 1)

    assert first.text == "One."


EAST = np.eye(16, dtype=np.float32)[0]
CUSTOM = {"type": "custom", "custom": {"name": "run", "input": "print(1)"}}
FUNCTION = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}


def calling(*pieces: Any) -> bytes:
    """A stream's events, each with its `tool_calls`."""
    return b"".join(b"data: %b\n\n" % orjson.dumps({"choices": [{"delta": {"tool_calls": each}}]}) for each in pieces)


async def test_calls_of_every_kind_of_tool_are_kept_alike_whole_and_streamed() -> None:
    whole = {"content": None, "tool_calls": [CUSTOM, FUNCTION]}
    streamed = [
        {"index": 0, "id": "c", "type": "custom", "custom": {"name": "run", "input": ""}},
        {"index": 0, "custom": {"input": "print"}},
        {"index": 0, "custom": {"input": "(1)"}},
        {"index": 1, "id": "f", "type": "function"},
        {"index": 1, "function": {"name": "weather", "arguments": "{"}},
        {"index": 1, "function": {"arguments": "}"}},
    ]

    assert (
        answer_in(whole) == await streamed_in(calling(*([call] for call in streamed))) == "run(print(1))\nweather({})"
    )


ODD_CALLS = {
    "nothing in a later piece": [{"index": 0, "function": {}}],
    "an id alone in a later piece": [{"index": 0, "id": "call_1"}],
    "nothing at all": [{"index": 0, "function": None}],
    "what is no call": ["call", 1, None],
    "no list": {"index": 0},
}


@pytest.mark.parametrize("odd", ODD_CALLS.values(), ids=ODD_CALLS)
async def test_pieces_that_say_nothing_of_a_call_are_passed_over(
    memory: Memory, store: EmbeddedStore, odd: Any
) -> None:
    first = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{"}}
    rest = {"index": 0, "function": {"name": None, "arguments": "}"}}

    result = await memory.keep([chat("Rain?", said=calling([first], odd, [rest]))])

    assert (result.kept, result.failed) == (1, [])
    assert (await store.search("Conversations_16", EAST, 1))[0].text == "User: Rain?\n\nAssistant: weather({})"


async def test_choices_that_are_none_of_openais_are_passed_over(memory: Memory, store: EmbeddedStore) -> None:
    odd = b'data: {"choices": ["text", {"delta": "text"}, {"delta": {"content": "Yes."}}]}\n\ndata: {"choices": 1}\n\n'

    await memory.keep([chat("Odd?", said=odd)])

    assert (await store.search("Conversations_16", EAST, 1))[0].text == "User: Odd?\n\nAssistant: Yes."


async def test_a_name_that_every_piece_of_a_call_repeats_is_kept_once() -> None:
    pieces = [[{"index": 0, "function": {"name": "f", "arguments": given}}] for given in ('{"a":', "1", "}")]

    assert await streamed_in(calling(*pieces)) == 'f({"a":1})'


async def test_calls_without_an_index_are_told_apart_by_their_ids() -> None:
    def piece(given: str, name: str | None = None, **of: str) -> dict[str, Any]:
        return {**of, "function": {"name": name, "arguments": given}}

    pieces = [
        [piece('{"a":', "f", id="1"), piece("{", "f", id="2")],
        [piece("1", id="1")],
        [piece("}", id="1"), piece("}", id="2")],
        [piece("{", "g", id="3")],
        [piece("", id="")],
        [piece("}")],
    ]

    assert await streamed_in(calling(*pieces)) == 'f({"a":1})\nf({})\ng({})'


async def test_a_call_whose_every_piece_has_another_id_is_one_by_its_index() -> None:
    pieces = [[{"index": 0, "id": given, "function": {"name": "f", "arguments": given}}] for given in ("{", "}")]

    assert await streamed_in(calling(*pieces)) == "f({})"


async def test_while_the_store_is_down_nobody_is_asked(tmp_path: Path, embedder: Embedder) -> None:
    file = tmp_path / "sekha.yaml"
    file.write_text(CONFIG)
    registry = Registry.from_config(load(file, environ={}).config, PriceMap.bundled())

    async def down() -> EmbeddedStore:
        raise StoreUnavailable("vectors.db", "it is locked")

    indexes = Indexes(down, now=time.monotonic)

    result = await Memory(registry, "conversations", store=down, indexes=indexes, embed=embedder).keep([chat("One.")])

    assert names(result.waiting) == ["One."]
    assert embedder.asked == []


def test_half_a_surrogate_costs_nothing_but_itself() -> None:
    assert decode(encode(chat("Half \ud800 of one."))).texts[0] == "Half ? of one."


@pytest.mark.parametrize("head", [b"[]", b"{}", b"no", b'{"tags": [], "texts": []}'])
def test_what_is_no_memo_is_refused(head: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(Item(head))
