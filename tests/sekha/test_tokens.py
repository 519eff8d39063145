import base64
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiktoken

from sekha.errors import InvalidRequest
from sekha.images import image_tokens
from sekha.providers.litellm import litellm_module
from sekha.tokens import count_messages, count_text, count_texts, tokenizer_of

TEXT = "The quick brown fox jumps over the lazy dog; naïve café, 東京, 12345.67 and `code()`.\n" * 20
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up in the dictionary.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "The word."}}},
    },
}
CHAT = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "name": "ada", "content": TEXT},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
]


@pytest.fixture(autouse=True)
def litellm_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let LiteLLM count, which it may not where it would fetch images to do so."""
    monkeypatch.setattr(litellm_module(), "disable_token_counter", False)


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4", "gpt-3.5-turbo", "claude-sonnet-4-5", "a-model-of-another-house"])
def test_texts_count_as_litellm_counts_them(model: str) -> None:
    # LiteLLM splits a long text every 1,024 characters, which adds at most a token at each seam.
    seams = len(TEXT) // 1024

    assert litellm_module().token_counter(model=model, text=TEXT) - seams <= count_text(TEXT, model)
    assert count_text(TEXT, model) <= litellm_module().token_counter(model=model, text=TEXT)


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4"])
def test_chats_count_as_litellm_counts_them(model: str) -> None:
    seams = len(TEXT) // 1024

    theirs = litellm_module().token_counter(model=model, messages=CHAT)

    assert theirs - seams <= count_messages(CHAT, model) <= theirs


def test_tools_count_as_no_less_than_litellm_says() -> None:
    # We count their JSON; OpenAI renders them as TypeScript, which LiteLLM imitates.
    ours = count_messages(CHAT, "gpt-4o", options={"tools": [TOOL]}) - count_messages(CHAT, "gpt-4o")

    theirs = litellm_module().token_counter(
        model="gpt-4o", messages=CHAT, tools=[TOOL]
    ) - litellm_module().token_counter(model="gpt-4o", messages=CHAT)

    assert theirs <= ours <= 3 * theirs


def test_known_counts() -> None:
    assert count_text("hello world", "gpt-4o") == 2
    assert count_texts(["hello world", "", "hello"], "gpt-4o") == [2, 0, 1]
    assert count_messages([{"role": "user", "content": "hello world"}], "gpt-4o") == 9


@pytest.mark.parametrize(
    ("model", "name", "exact"),
    [
        ("gpt-4o", "o200k_base", True),
        ("openrouter/openai/gpt-5-mini", "o200k_base", True),
        ("gpt-9-not-yet-made", "o200k_base", False),
        ("text-embedding-3-small", "cl100k_base", True),
        ("claude-2.1", "claude", True),
        ("anthropic/claude-sonnet-4-5", "claude", False),
        ("llama3.1:8b", "cl100k_base", False),
    ],
)
def test_a_count_says_whether_it_is_exact(model: str, name: str, exact: bool) -> None:
    tokenizer = tokenizer_of(model)

    assert (tokenizer.name, tokenizer.exact) == (name, exact)


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4", "claude-sonnet-4-5"])
@pytest.mark.parametrize(
    "text", ["<|endoftext|><|fim_prefix|>", "half a pair \ud800", "\0", "\n\nHuman:", "a" * 200_000]
)
def test_no_text_is_too_strange_to_count(model: str, text: str) -> None:
    assert count_text(text, model) > 0


def test_a_tool_call_and_its_result_are_counted() -> None:
    called = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "' + TEXT + '"}'}}
    chat = [
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "1", "content": TEXT},
    ]

    assert count_messages(chat, "gpt-4o") > 2 * count_text(TEXT, "gpt-4o")


LONG = "word " * 3000
SCHEMA = {"type": "json_schema", "json_schema": {"name": "it", "schema": {"type": "object", "description": LONG}}}


@pytest.mark.parametrize(
    "message",
    [
        {"content": "y", "reasoning_content": LONG},
        {"content": "y", "reasoning": LONG},
        {"content": None, "refusal": LONG},
        {"refusal": LONG},
        {"content": None, "function_call": {"name": "f", "arguments": LONG}},
        {"content": None, "function_call": LONG},
        {"content": None, "tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "f", "input": LONG}}]},
        {"content": None, "tool_calls": [{"id": LONG, "type": "function", "function": {"name": "f"}}]},
        {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"arguments": {"a": LONG}}}]},
        {"content": "y", "thinking_blocks": [{"type": "thinking", "thinking": LONG}]},
        {"content": [{"type": "refusal", "refusal": LONG}]},
        {"content": [{"type": "thinking", "thinking": LONG}]},
        {"content": [{"type": ["text"], "text": LONG}]},
        {"content": "y", "name": "ada", "tool_call_id": LONG},
        {"content": "y", "name": LONG},
    ],
)
def test_every_field_of_a_message_counts(message: dict[str, object]) -> None:
    assert count_messages([{"role": "assistant", **message}], "gpt-4o") >= count_text(LONG, "gpt-4o")


@pytest.mark.parametrize(
    "options",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "description": LONG}}]},
        {"functions": [{"name": "f", "description": LONG}]},
        {"function_call": {"name": LONG}},
        {"tool_choice": {"type": "function", "function": {"name": LONG}}},
        {"response_format": SCHEMA},
        {"prediction": {"type": "content", "content": LONG}},
        {"documents": [LONG]},
        {"a_field_of_a_provider_to_come": LONG},
    ],
)
def test_every_field_of_a_request_that_is_read_counts(options: dict[str, object]) -> None:
    plain = count_messages(CHAT, "gpt-4o")

    assert count_messages(CHAT, "gpt-4o", options=options) - plain >= count_text(LONG, "gpt-4o")


def test_what_steers_a_provider_and_is_not_read_counts_nothing() -> None:
    settings: dict[str, object] = {
        "temperature": 0.5,
        "logit_bias": {str(token): -100 for token in range(300)},
        "stop": ["END"],
        "user": "u" * 200,
        "stream_options": {"include_usage": True},
        "reasoning": {"effort": "high"},
        "tool_choice": "auto",
        "tools": [],
    }

    assert count_messages(CHAT, "gpt-4o", options=settings) == count_messages(CHAT, "gpt-4o")


def test_the_data_of_a_file_are_not_read_as_text() -> None:
    file = {"filename": "a.pdf", "file_data": "data:application/pdf;base64," + "QUJD" * 250_000}
    parts = [{"type": "file", "file": file}, {"type": "file", "file": {"file_id": "file-abc"}}]

    each = [count_messages([{"role": "user", "content": [part]}], "gpt-4o") for part in parts]

    assert all(1_000 < tokens < 5_000 for tokens in each), each


def test_a_field_that_cannot_be_written_as_json_is_refused_by_name() -> None:
    deep: object = "x"
    for _ in range(400):
        deep = [deep]

    with pytest.raises(InvalidRequest, match="`response_format` cannot be written as JSON") as caught:
        count_messages(CHAT, "gpt-4o", options={"response_format": deep})
    assert caught.value.field == "response_format"


def test_an_image_counts_by_its_size_and_one_behind_a_url_as_the_largest() -> None:
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 512, 512)
    inline = {"url": "data:image/png;base64," + base64.b64encode(data).decode(), "detail": "high"}

    def with_image(reference: object) -> int:
        part = {"type": "image_url", "image_url": reference}
        return count_messages([{"role": "user", "content": [part]}], "gpt-4o") - count_messages(
            [{"role": "user", "content": ""}], "gpt-4o"
        )

    assert with_image(inline) == 255
    assert with_image({"url": "https://example.com/cat.png"}) == image_tokens("gpt-4o", None)
    assert with_image("https://example.com/cat.png") == image_tokens("gpt-4o", None)
    assert with_image({"url": "data:image/png;base64,broken"}) == image_tokens("gpt-4o", None)


def test_threads_may_count_at_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        counts = set(pool.map(lambda _: count_text(TEXT, "gpt-4"), range(32)))

    assert len(counts) == 1


def test_counting_needs_neither_litellm_nor_the_network(tmp_path) -> None:
    program = (
        "import socket, sys, os\n"
        "def refuse(*_): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "from sekha.tokens import count_text\n"
        "for model in ('gpt-4o', 'gpt-4', 'text-davinci-003', 'claude-3'):\n"
        "    assert count_text('hello world', model) > 0\n"
        "assert 'litellm' not in sys.modules\n"
        f"assert os.environ['TIKTOKEN_CACHE_DIR'] == {str(tmp_path)!r}\n"
        f"assert not os.listdir({str(tmp_path)!r})\n"
    )

    environment = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_an_application_may_extend_an_encoding_of_tiktokens_as_its_readme_says(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Path(litellm_module().__file__).parent / "litellm_core_utils" / "tokenizers"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shipped))
    count_text("hello world", "gpt-4")

    base = tiktoken.get_encoding("cl100k_base")
    extended = tiktoken.Encoding(
        name="cl100k_im",
        pat_str=base._pat_str,
        mergeable_ranks=base._mergeable_ranks,
        special_tokens={**base._special_tokens, "<|im_start|>": 100264},
    )

    assert extended.decode(extended.encode("hello world")) == "hello world"
