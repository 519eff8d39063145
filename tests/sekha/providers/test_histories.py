"""What stands in a chat's messages reaches a provider of another protocol, or is refused: it is never left out."""

from contextlib import aclosing
from typing import Any

import pytest
from pydantic import SecretStr

from sekha.errors import FieldUnsupported
from sekha.providers.base import ChatCall
from sekha.providers.opening import open_provider
from sekha.registry import Model, ProviderKind, ProviderSpec
from sekha.testing import StandIn

USER = {"role": "user", "content": "Hello"}
IMAGE = {
    "type": "image_url",
    "image_url": {"url": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAA="},
}
PDF = {"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA", "filename": "a.pdf"}}
VIDEO = {"type": "video_url", "video_url": {"url": "https://host/film.mp4"}}
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "signed"}
HIDDEN = {"type": "redacted_thinking", "data": "AAAA"}
TEXT = {"type": "text", "text": "Hi"}
SOUND = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


async def request(kind: ProviderKind, *messages: dict[str, Any], **options: object) -> dict[str, Any]:
    """What a provider is sent with these messages."""
    model = Model(id="claude-sonnet-4-5" if kind == "anthropic" else "llava", provider_id="one", tasks=("vision",))
    async with StandIn() as standin:
        spec = ProviderSpec(id="one", kind=kind, base_url=standin.url, api_key=SecretStr("k"))
        try:
            async with aclosing(open_provider(spec)) as provider:
                await provider.complete(ChatCall(model=model, messages=messages, options=options, timeout_seconds=20))
        except FieldUnsupported:
            assert standin.requests == []
            raise
    body: dict[str, Any] = standin.requests[0].json
    return body


async def sent(kind: ProviderKind, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """What a provider is sent of these messages."""
    history: list[dict[str, Any]] = (await request(kind, *messages))["messages"]
    return history


def called(arguments: object, **more: object) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_a", "type": "function", "function": function, **more}],
    }


def asked(*parts: object, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": "See:"}, *parts]}


@pytest.mark.parametrize(
    ("kind", "message", "field"),
    [
        ("ollama", asked(PDF), "messages[1].content[1]"),
        ("ollama", asked(VIDEO), "messages[1].content[1]"),
        ("ollama", asked(SOUND), "messages[1].content[1]"),
        ("anthropic", asked(VIDEO), "messages[1].content[1]"),
        ("anthropic", asked(SOUND), "messages[1].content[1]"),
        ("anthropic", asked({"type": "file", "file": {}}), "messages[1].content[1].file"),
        ("anthropic", asked({"type": "file", "file": {"file_data": "zzz"}}), "messages[1].content[1].file"),
        ("anthropic", asked(IMAGE, role="system"), "messages[1].content[1]"),
        ("anthropic", asked(IMAGE, role="assistant"), "messages[1].content[1]"),
        ("anthropic", called("{}", type="custom"), "messages[1].tool_calls[0]"),
        ("anthropic", {"role": "assistant", "content": "a", "thinking_blocks": "x"}, "messages[1].thinking_blocks"),
        ("anthropic", {"role": "assistant", "content": [THOUGHT, TEXT, HIDDEN]}, "messages[1].content[2]"),
        ("anthropic", {"role": "function", "name": "g", "content": "r"}, "messages[1].name"),
        *[
            (kind, message, field)
            for kind in ("ollama", "anthropic")
            for message, field in [
                (asked({"type": "zzz", "zzz": 1}), "messages[1].content[1]"),
                (asked({"text": "no type"}), "messages[1].content[1]"),
                (asked({"type": "input_image", "image_url": IMAGE["image_url"]}), "messages[1].content[1]"),
                (asked({"type": "text", "text": None}), "messages[1].content[1].text"),
                (called('{"a'), "messages[1].tool_calls[0].function.arguments"),
                (called('{"a": NaN, "b": "\\ud83d"}'), "messages[1].tool_calls[0].function.arguments"),
                (called("[1]"), "messages[1].tool_calls[0].function.arguments"),
                ({"role": "zzz", "content": "x"}, "messages[1].role"),
                ({"role": "assistant", "audio": {"id": "audio_1"}}, "messages[1].audio"),
            ]
        ],
    ],
)
async def test_what_a_protocol_has_no_place_for_is_refused_by_its_place(
    kind: ProviderKind, message: dict[str, Any], field: str
) -> None:
    with pytest.raises(FieldUnsupported) as caught:
        await sent(kind, USER, message)

    assert caught.value.field == field
    assert f"has no place for `{field}`" in str(caught.value)


async def test_anthropic_is_sent_images_and_files() -> None:
    (message,) = await sent("anthropic", asked(IMAGE, PDF))

    assert [part["type"] for part in message["content"]] == ["text", "image", "document"]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ],
    ids=["field", "part"],
)
async def test_a_refusal_is_text(message: dict[str, Any]) -> None:
    _, to_anthropic, _ = await sent("anthropic", USER, message, USER)
    _, to_ollama, _ = await sent("ollama", USER, message, USER)

    assert to_anthropic == {"role": "assistant", "content": [{"type": "text", "text": "No."}]}
    assert to_ollama["content"] == "No."


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ("", {}),
        (None, {}),
        ({"a": 1}, {"a": 1}),
        ('{"a": 1}', {"a": 1}),
        (r'{"a": "\ud83d\ude00"}', {"a": "😀"}),
        (r'{"a": "\ud83d", "\ude00": ["é\ud83d\ude00"]}', {"a": "\ufffd", "\ufffd": ["é😀"]}),
    ],
)
async def test_arguments_of_a_call_are_an_object_however_they_were_written(arguments: object, given: object) -> None:
    result = {"role": "tool", "tool_call_id": "call_a", "content": "r"}

    _, to_anthropic, _ = await sent("anthropic", USER, called(arguments), result)
    _, to_ollama, _ = await sent("ollama", USER, called(arguments), result)

    assert to_anthropic["content"][0]["input"] == given
    assert to_ollama["tool_calls"][0]["function"] == {"name": "f", "arguments": given}


async def test_a_call_and_its_result_of_the_old_way_have_one_id() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    result = {"role": "function", "name": "f", "content": "r"}

    _, assistant, user = await sent("anthropic", USER, call, result)

    assert assistant["content"][0]["type"] == "tool_use"
    assert assistant["content"][0]["id"] == user["content"][0]["tool_use_id"]


@pytest.mark.parametrize("as_text", [False, True])
async def test_a_scheme_in_capitals_is_one(as_text: bool) -> None:
    url = "HTTPS://host/Cat.png"

    (message,) = await sent("anthropic", asked({"type": "image_url", "image_url": url if as_text else {"url": url}}))

    assert message["content"][1]["source"] == {"type": "url", "url": "https://host/Cat.png"}


def numbered(*thoughts: dict[str, Any]) -> list[dict[str, Any]]:
    """As whoever adds a stream up may have numbered them."""
    return [each | {"index": at} for at, each in enumerate(thoughts)]


@pytest.mark.parametrize(
    "message",
    [
        {"content": "Hi", "thinking_blocks": [THOUGHT, HIDDEN]},
        {"content": "Hi", "thinking_blocks": numbered(THOUGHT, HIDDEN)},
        {"content": [THOUGHT, HIDDEN, TEXT]},
        {"content": [*numbered(THOUGHT, HIDDEN), TEXT]},
        {"content": [HIDDEN, TEXT], "thinking_blocks": [THOUGHT]},
        {"content": [THOUGHT, HIDDEN, TEXT], "thinking_blocks": numbered(THOUGHT, HIDDEN)},
    ],
    ids=["field", "field, numbered", "parts", "parts, numbered", "some in each", "all in both"],
)
async def test_thoughts_reach_anthropic_as_it_wrote_them(message: dict[str, Any]) -> None:
    _, answer, _ = await sent("anthropic", USER, {"role": "assistant", **message}, USER)

    assert answer["content"] == [THOUGHT, HIDDEN, TEXT]


USE = {"type": "tool_use", "id": "call_a", "name": "f", "input": {}}
BLANK = {"type": "text", "text": " \n"}


@pytest.mark.parametrize("content", ["", " \n", [], [BLANK], None])
async def test_empty_text_beside_a_call_is_left_out_at_anthropic(content: object) -> None:
    result = {"role": "tool", "tool_call_id": "call_a", "content": "r"}

    _, answer, _ = await sent("anthropic", USER, called("{}") | {"content": content}, result)

    assert answer == {"role": "assistant", "content": [USE]}


async def test_empty_text_beside_other_parts_is_left_out_at_anthropic() -> None:
    question, answer = await sent(
        "anthropic",
        {"role": "user", "content": [BLANK, IMAGE, {"type": "text", "text": ""}]},
        {"role": "assistant", "content": [BLANK, TEXT]},
    )

    assert [part["type"] for part in question["content"]] == ["image"]
    assert answer["content"] == [TEXT]


@pytest.mark.parametrize("content", ["", " ", [], [BLANK], None])
async def test_a_user_who_says_nothing_is_refused_at_anthropic_in_no_words_of_ours(content: object) -> None:
    with pytest.raises(FieldUnsupported) as caught:
        await sent("anthropic", USER, {"role": "user", "content": content})

    assert caught.value.field == "messages[1].content"
    assert "it takes no message that says nothing, as `messages[1]` does" in str(caught.value)


@pytest.mark.parametrize("content", ["", " ", [], [BLANK], None])
async def test_an_answer_that_says_nothing_is_left_out_at_anthropic(content: object) -> None:
    history = await sent("anthropic", USER, {"role": "assistant", "content": content}, USER)

    assert history == [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}] * 2


@pytest.mark.parametrize("role", ["system", "developer"])
async def test_instructions_in_between_are_system_at_anthropic_in_no_words_but_their_own(role: str) -> None:
    result = {"role": "tool", "tool_call_id": "call_a", "content": "r"}
    between = {"role": role, "content": "Be brief."}

    body = await request(
        "anthropic",
        {"role": "system", "content": "Be kind."},
        USER,
        called("{}"),
        between,
        result,
        {"role": role, "content": [TEXT, BLANK]},
        {"role": role, "content": " "},
    )

    assert [part["text"] for part in body["system"]] == ["Be kind.", "Be brief.", "Hi"]
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert [part["type"] for part in body["messages"][-1]["content"]] == ["tool_result"]
    assert "Operator" not in str(body)


async def test_names_and_strict_tools_are_hints_at_anthropic() -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}

    plain = await request("anthropic", USER, tools=[{"type": "function", "function": function}])
    hinted = await request(
        "anthropic", USER | {"name": "bob"}, tools=[{"type": "function", "function": function | {"strict": True}}]
    )

    assert hinted == plain


async def test_a_name_is_a_hint_at_ollama() -> None:
    assert await request("ollama", USER | {"name": "bob"}) == await request("ollama", USER)
