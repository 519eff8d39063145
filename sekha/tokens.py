"""How many tokens a text or a chat is, counted with the tokenizers that LiteLLM ships.

Nothing is downloaded and LiteLLM is not imported. Counting is plain CPU work, about 0.2 ms for a
thousand tokens, and the first count of a tokenizer reads its file: call it from a thread.
"""

from __future__ import annotations

import hashlib
from binascii import a2b_base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from types import FunctionType
from typing import Any, Literal, TypeAlias

import orjson

from sekha.errors import InvalidRequest
from sekha.images import Image, data_in_url, formula_of, read_image
from sekha.words import ByWord

__all__ = [
    "MEDIA",
    "NOT_IN_PROMPT",
    "Tokenizer",
    "TokenizerName",
    "count_each",
    "count_messages",
    "count_plain",
    "count_text",
    "count_texts",
    "count_words",
    "decoded",
    "images_in",
    "load",
    "tokenizer_of",
]

TokenizerName: TypeAlias = Literal["o200k_base", "cl100k_base", "p50k_base", "claude", "words"]

# tiktoken names a cached file by the SHA-1 of the address it would download it from.
_FILES: Mapping[TokenizerName, str] = {
    "o200k_base": "fb374d419588a4632f3f557e76b4b70aebbca790",
    "cl100k_base": "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
    "p50k_base": "ec7223a39ce59f226a68acc30dc1af2788490e15",
    "claude": "anthropic_tokenizer.json",
}
_PER_MESSAGE = 3
_PER_NAME = 1
_PER_REPLY = 3
_PER_OPTION = 9
_PLAIN = frozenset({"role", "content", "name"})
"""What a message may have that is text alone."""
_PROMPTS = frozenset({"system", "developer"})
_REMEMBERED_CHARACTERS = 16_384
_APART = _PLAIN | {"cache_control"}
"""Fields of a message that are counted by themselves, or are not read."""
MEDIA = frozenset(
    {
        "audio",
        "file",
        "input_file",
        "file_url",
        "document",
        "input_audio",
        "audio_url",
        "video",
        "video_url",
        "input_video",
        "container_upload",
    }
)
"""Parts whose tokens only their provider knows: of a PDF the text that is in it and an image of each page."""
_PER_MEDIA = 4_000
"""Tokens that one of them is taken for at the most: two or three pages. What it costs at the worst is another matter,
and said by the model's context window.
"""
_BYTES_OF_MEDIA = 64
"""Characters of base64 for each of those tokens."""
NOT_IN_PROMPT = frozenset(
    {
        # These steer how a provider answers, and no model reads them.
        "audio",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "metadata",
        "modalities",
        "model",
        "models",
        "n",
        "parallel_tool_calls",
        "presence_penalty",
        "prompt_cache_key",
        "provider",
        "reasoning",
        "reasoning_effort",
        "safety_identifier",
        "seed",
        "service_tier",
        "stop",
        "store",
        "stream",
        "stream_options",
        "temperature",
        "thinking",
        "top_k",
        "top_logprobs",
        "top_p",
        "transforms",
        "usage",
        "user",
        "verbosity",
        "web_search_options",
    }
)
"""Fields of a request that are no input, whatever stands in them. Any other counts, unless it is short."""
_SHORT = 64
"""Characters up to which a text is a setting, and not something to read."""

_loading = Lock()
_counters: dict[TokenizerName, Callable[[str], int]] = {}


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What counts a model's tokens, and whether the model itself splits text so."""

    name: TokenizerName
    exact: bool


@cache
def tokenizer_of(model: str) -> Tokenizer:
    """The tokenizer for a model id, with or without a provider in front of it.

    Exact for OpenAI's models, and for the built-in ones, which count words. Claude 3 and later are
    counted by the tokenizer of Claude 2, the last that Anthropic published, and run higher; every other
    model by `cl100k_base`, from which Llama 3's grew and which is within a fifth of most others on
    English text.
    """
    name = model.rpartition("/")[2]
    if name == "echo" or name.startswith("hashed-"):
        return Tokenizer("words", exact=True)
    if "claude" in name:
        return Tokenizer("claude", exact=name.startswith(("claude-1", "claude-2", "claude-instant")))
    import tiktoken

    try:
        encoding = tiktoken.encoding_name_for_model(name.removeprefix("ft:"))
    except KeyError:
        # Newer than the installed tiktoken knows; every OpenAI model since GPT-4o has this one.
        newer = name.startswith(("gpt-", "chatgpt-", "o1", "o3", "o4", "o5"))
        return Tokenizer("o200k_base", exact=False) if newer else Tokenizer("cl100k_base", exact=False)
    match encoding:
        case "o200k_base" | "o200k_harmony":
            return Tokenizer("o200k_base", exact=True)
        case "cl100k_base":
            return Tokenizer("cl100k_base", exact=True)
        case _:
            return Tokenizer("p50k_base", exact=encoding == "p50k_base")


def count_text(text: str, model: str) -> int:
    """Tokens of one text. Markers such as `<|endoftext|>` count as the characters they are."""
    return count_texts([text], model)[0]


def count_texts(texts: Sequence[str], model: str) -> list[int]:
    return count_each(texts, tokenizer_of(model).name)


def count_each(texts: Sequence[str], tokenizer: TokenizerName) -> list[int]:
    return list(map(_counter(tokenizer), texts))


def decoded(tokens: Sequence[int], model: str) -> str:
    """The text that these tokens of a model stand for; `cl100k_base` where the model's own are not OpenAI's.

    Raises `InvalidRequest` for a number that is no token, and for tokens that begin or end within a letter.
    """
    # Not remembered: callers name models as they like.
    name = tokenizer_of.__wrapped__(model).name
    encoding = _encoding("cl100k_base" if name in ("claude", "words") else name)
    try:
        return str(encoding.decode(list(tokens), errors="strict"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"`input` has tokens of {encoding.name} that are no whole text: they begin or end within a letter. "
            "Send whole letters, or the text itself.",
            field="input",
        ) from error
    except (KeyError, OverflowError) as error:
        raise InvalidRequest(f"`input` has a number that is no token of {encoding.name}.", field="input") from error


def count_messages(
    messages: Sequence[Mapping[str, Any]], model: str, *, options: Mapping[str, Any] | None = None
) -> int:
    """Tokens of a chat in OpenAI's shape, as a provider would bill its input: its words and its images."""
    formula = formula_of(model)
    words = count_words(messages, tokenizer_of(model).name, options=options)
    return words + sum(formula.tokens(image, detail) for image, detail in images_in(messages))


def count_words(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: TokenizerName,
    *,
    options: Mapping[str, Any] | None = None,
) -> int:
    """Tokens of a chat but for its images, and with a guess for its `MEDIA`.

    Messages carry OpenAI's published overhead, and every field of theirs counts. So does every one of the
    `options` that a provider puts into the prompt: tools, a schema, a prediction. What is no text counts as
    its JSON, which is more than OpenAI's terser rendering of it. Raises `InvalidRequest` for what cannot be
    written as JSON.
    """
    count = _counter(tokenizer)
    total = _PER_REPLY
    for message in messages:
        role = str(message.get("role", ""))
        total += _PER_MESSAGE + _count_role(role, tokenizer)
        known = 2
        if name := message.get("name"):
            total += _PER_NAME + count(str(name))
            known = 3
        content = message.get("content")
        if isinstance(content, str):
            total += _count_prompt(content, tokenizer) if role in _PROMPTS else count(content)
        elif content:
            total += sum(_count_part(part, count) for part in content)
        # As a rule there is a role and a text, and nothing else.
        if (len(message) > known or not isinstance(content, str)) and not _APART.issuperset(message):
            total += _count_fields(message, count)
    if options:
        for name, value in options.items():
            if name not in NOT_IN_PROMPT and (text := _prompted(value, name)):
                total += _PER_OPTION + _count_prompt(text, tokenizer)
    return total


def count_plain(messages: object, tokenizer: TokenizerName, *, most: int) -> int | None:
    """What `count_words` says of messages of text alone, which have a role, a content and maybe a name.

    None for anything else, and for more than `most` characters.
    """
    if type(messages) is not list or not messages:
        return None
    count = _counter(tokenizer)
    total = _PER_REPLY
    for message in messages:
        if type(message) is not dict:
            return None
        role, content = message.get("role"), message.get("content")
        if type(role) is not str or type(content) is not str:
            return None
        if len(message) > 2 and not _PLAIN.issuperset(message):
            return None
        most -= len(content)
        if most < 0:
            return None
        total += _PER_MESSAGE + _count_role(role, tokenizer)
        if len(message) > 2 and (name := message["name"]):
            total += _PER_NAME + count(str(name))
        total += _count_prompt(content, tokenizer) if role in _PROMPTS else count(content)
    return total


def images_in(messages: Sequence[Mapping[str, Any]]) -> list[tuple[Image | None, str]]:
    """Each image of a chat with its `detail`; None for one behind a URL, or that cannot be read."""
    return [
        _image(part.get("image_url"))
        for message in messages
        if not isinstance(content := message.get("content"), str)
        for part in content or ()
        if part.get("type") == "image_url"
    ]


# There are a handful of roles, and one in every message.
@lru_cache(maxsize=64)
def _count_role(role: str, tokenizer: TokenizerName) -> int:
    return _counter(tokenizer)(role)


def _count_prompt(text: str, tokenizer: TokenizerName) -> int:
    """Count what every chat of a program begins with, long as a rule: four kilobytes take 200 us."""
    return _count_again(text, tokenizer) if len(text) <= _REMEMBERED_CHARACTERS else _counter(tokenizer)(text)


@lru_cache(maxsize=64)
def _count_again(text: str, tokenizer: TokenizerName) -> int:
    return _counter(tokenizer)(text)


def _count_part(part: Mapping[str, Any], count: Callable[[str], int]) -> int:
    match kind := part.get("type"):
        case "text":
            return count(str(part.get("text", "")))
        case "image_url":
            return 0
        case str() if kind in MEDIA:
            return _count_media(part.get(kind))
        case _:
            return count(_written(part, "messages"))


def _count_media(held: object) -> int:
    """Guess at a file: by its size where its data are here, and else as a large one."""
    data = held.get("file_data") or held.get("data") if isinstance(held, Mapping) else None
    return min(_PER_MEDIA // 8 + len(data) // _BYTES_OF_MEDIA, _PER_MEDIA) if isinstance(data, str) else _PER_MEDIA


def _count_fields(message: Mapping[str, Any], count: Callable[[str], int]) -> int:
    """Count what few messages have: calls of tools and whose answer it is, thoughts, a refusal."""
    total = 0
    for name, value in message.items():
        if name in _APART or value is None:
            continue
        if name == "tool_calls" and isinstance(value, list | tuple):
            total += sum(_count_call(call, count) for call in value)
        elif name == "function_call":
            total += _count_called(value, count)
        else:
            total += _PER_MEDIA if name == "audio" else count(_text(value))
    return total


def _count_call(call: object, count: Callable[[str], int]) -> int:
    if not isinstance(call, Mapping):
        return count(_text(call))
    return sum(
        _count_called(value, count) if name in ("function", "custom") else count(_text(value))
        for name, value in call.items()
        if name not in ("type", "index", "cache_control") and value is not None
    )


def _count_called(called: object, count: Callable[[str], int]) -> int:
    """Count a call's name and what it is given, which is text as a rule: as JSON it would be quoted once more."""
    if not isinstance(called, Mapping):
        return count(_text(called))
    return count("".join(_text(value) for value in called.values() if value is not None))


def _prompted(value: object, name: str) -> str:
    """What an option adds to the prompt; nothing when it is a number, a switch or a short text."""
    if isinstance(value, str):
        return value if len(value) > _SHORT else ""
    return _written(value, name) if value and isinstance(value, Mapping | list | tuple) else ""


def _text(value: object) -> str:
    return value if isinstance(value, str) else _written(value, "messages")


def _written(value: object, field: str) -> str:
    try:
        return orjson.dumps(value, default=_as_json, option=orjson.OPT_NON_STR_KEYS).decode()
    except orjson.JSONEncodeError as error:
        raise InvalidRequest(
            f"`{field}` cannot be written as JSON, as providers take it: {error}.", field=field
        ) from error


def _as_json(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else str(value)


def _image(reference: object) -> tuple[Image | None, str]:
    reference = {"url": reference} if isinstance(reference, str) else reference
    if not isinstance(reference, Mapping):
        return None, "auto"
    detail = str(reference.get("detail") or "auto")
    try:
        data = data_in_url(str(reference.get("url", "")))
        return None if data is None else read_image(data), detail
    except InvalidRequest:
        return None, detail


def load(models: Iterable[str]) -> None:
    """Load what counts for these models, so that the first request need not wait for it: half a second for some."""
    for name in dict.fromkeys(tokenizer_of(model).name for model in models):
        _counter(name)


def _counter(name: TokenizerName) -> Callable[[str], int]:
    if (counter := _counters.get(name)) is None:
        # One at a time, or two threads would load the same file at once.
        with _loading:
            counter = _counters.get(name) or _counters.setdefault(name, _load(name))
    return counter


def _load(name: TokenizerName) -> Callable[[str], int]:
    if name == "words":
        return lambda text: len(text.split())
    return ByWord(_load_claude(_file(name)) if name == "claude" else _load_tiktoken(name))


def _load_claude(file: Path) -> Callable[[str], int]:
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer.from_file(str(file))

    def count(text: str) -> int:
        # A lone surrogate cannot cross into Rust; it counts as the mark that replaces it.
        whole = text.encode(errors="replace").decode()
        return len(tokenizer.encode(whole, add_special_tokens=False).ids)

    return count


def _load_tiktoken(name: TokenizerName) -> Callable[[str], int]:
    encoding = _encoding(name)
    return lambda text: len(encoding.encode_ordinary(text))


@cache
def _encoding(name: TokenizerName) -> Any:
    # One of our own: what `tiktoken.get_encoding` gives belongs to all of the program.
    from tiktoken import Encoding
    from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS  # type: ignore[import-untyped]

    # What tiktoken says of it, but for its table: reading that its way takes three times as long, and asks the
    # network for a file that is not in a folder which the environment names.
    says = ENCODING_CONSTRUCTORS[name]
    read = {"load_tiktoken_bpe": lambda _, expected_hash: _ranks(_file(name), expected_hash)}
    made_of = FunctionType(says.__code__, {**says.__globals__, **read})()
    encoding = Encoding(**made_of)
    # tiktoken has made its own tables of them, and keeps these, thirty megabytes, only to be pickled.
    made_of["mergeable_ranks"].clear()
    return encoding


def _ranks(file: Path, sha256: str) -> dict[bytes, int]:
    """The tokens of a file of lines, each with its rank behind it."""
    written = file.read_bytes()
    if hashlib.sha256(written).hexdigest() != sha256:
        raise RuntimeError(
            f"The installed LiteLLM's tokenizer file {file.name!r} is not what it was made as; reinstall it."
        )
    words = written.split()
    return dict(zip(map(a2b_base64, words[::2]), map(int, words[1::2]), strict=True))


def _file(name: TokenizerName) -> Path:
    file = _folder() / _FILES[name]
    if not file.is_file():
        raise RuntimeError(f"The installed LiteLLM lacks its tokenizer file {file.name!r}; reinstall it.")
    return file


def _folder() -> Path:
    spec = find_spec("litellm")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("LiteLLM, whose tokenizer files count tokens, is not installed.")
    return Path(spec.submodule_search_locations[0]) / "litellm_core_utils" / "tokenizers"
