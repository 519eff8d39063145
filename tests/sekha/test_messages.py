"""What is no chat in OpenAI's shape, refused before anybody counts, prices or sends it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekha.chat import ChatRequest
from sekha.errors import InvalidRequest
from sekha.steps.counting import count_chat

HELLO = ({"role": "user", "content": "Hello"},)
SHOWN = {"type": "x", "image_url": 5}
CALLED = {"role": "assistant", "tool_calls": [{"function": 5}]}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": 5}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [*HELLO, {"role": 5, "content": "Hello"}]}, "messages[1]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
        *[
            ({"messages": [{"role": "user", "content": [part]}]}, "messages[0].content[0].type")
            for part in [
                {"image_url": {"url": "data:image/png;base64,AAAA"}},
                {"type": None, "image_url": {"url": "data:image/png;base64,AAAA"}},
                {"input_audio": {"data": "AAAA", "format": "wav"}},
                {"text": "x"},
                {"type": "input_image", "image_url": "data:image/png;base64,AAAA"},
                {"type": "input_image", "file_id": "file-1"},
                {"type": 5, "text": "x"},
                {},
            ]
        ],
        ({"messages": [{"role": "user", "content": [SHOWN]}]}, "messages[0].content[0].image_url"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "messages[0].tool_calls[0]"),
        ({"messages": [CALLED]}, "messages[0].tool_calls[0].function"),
        ({"options": 5}, "options"),
        ({"options": None}, "options"),
        ({"options": {"tools": 5}}, "tools"),
        ({"options": {"tools": [{}, "x"]}}, "tools[1]"),
        ({"options": {"modalities": 5}}, "modalities"),
        ({"options": {"stream_options": True}}, "stream_options"),
        ({"options": {"n": "two"}}, "n"),
    ],
)
def test_what_is_not_as_openai_has_it_is_refused_by_its_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatRequest(**{"messages": HELLO, **fields})

    assert caught.value.field == field
    assert f"`{field}`" in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
OPTIONS = ["max_completion_tokens", "max_tokens", "modalities", "n", "service_tier", "stream_options", "tools"]
FIELDS = ["cache_control", "content", "function", "image_url", "name", "text", "tool_calls", "ttl", "type"]
WORDS = st.sampled_from(["user", "text", "image_url", "input_audio", "https://example.com/a.png"])


def near(names: list[str]) -> st.SearchStrategy[Any]:
    """Any JSON, and objects with these names more often than chance would have it."""
    return st.recursive(
        JSON | WORDS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(names), inner, max_size=4),
        max_leaves=8,
    )


MESSAGE = st.fixed_dictionaries({"role": WORDS | JSON}, optional=dict.fromkeys(FIELDS, near(FIELDS)))


@given(st.lists(MESSAGE, max_size=3) | JSON, st.dictionaries(st.sampled_from(OPTIONS), near(FIELDS)) | JSON)
def test_any_json_makes_a_request_that_can_be_counted_and_routed_or_is_refused(messages: Any, options: Any) -> None:
    for given_ in ({"messages": messages}, {"messages": HELLO, "options": options}):
        try:
            request = ChatRequest(**given_)
            ask = request.ask()
        except InvalidRequest:
            continue

        assert ask.kind == "chat"
        assert request.replies > 0
        assert request.reply_limit is None or request.reply_limit > 0
        assert asyncio.run(count_chat(request, "gpt-4o")) > 0
