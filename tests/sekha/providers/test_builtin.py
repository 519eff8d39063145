import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from sekha.errors import DimensionMismatch, ModelNotFound, ProviderRejected
from sekha.providers.base import ChatCall
from sekha.providers.builtin import BuiltinProvider, hashed_embeddings
from sekha.registry import Model, ProviderSpec

TEXTS = ["A wing in a supersonic flow.", "naïve café 東京 Straße", "", "!!!", "a", "the the the\n\nthe"]


def provider() -> BuiltinProvider:
    return BuiltinProvider(ProviderSpec(id="builtin", kind="builtin"))


def model(name: str, dimension: int | None = None) -> Model:
    return Model(id=name, provider_id="builtin", tasks=("embedding",), dimension=dimension)


def echo(*messages: dict[str, object], **options: object) -> ChatCall:
    chat = Model(id="echo", provider_id="builtin", tasks=("chat_small",))
    return ChatCall(model=chat, messages=messages, options=options)


def test_the_vectors_of_this_version_never_change() -> None:
    digest = hashlib.sha256(hashed_embeddings(TEXTS, 768).tobytes()).hexdigest()

    # Stored vectors depend on it: whoever changes it gives the new ones another name than `hashed-`.
    assert digest == "cb09c8dcf57b0f868c3c734913b430d67de05c88d3c020a54af40e5f8a0e4ca9"


def test_another_process_makes_the_same_vectors() -> None:
    program = (
        "import hashlib; from sekha.providers.builtin import hashed_embeddings; "
        f"print(hashlib.sha256(hashed_embeddings({TEXTS[::-1]!r}, 768)[::-1].tobytes()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf-8"}

    printed = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment
    )

    assert printed.stdout.strip() == hashlib.sha256(hashed_embeddings(TEXTS, 768).tobytes()).hexdigest()


@pytest.mark.parametrize("dimension", [1, 2, 384, 768, 1536, 3072])
def test_every_text_has_a_unit_vector_in_any_dimension(dimension: int) -> None:
    vectors = hashed_embeddings([*TEXTS, "\ud800", "x" * 100_000], dimension)

    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-6)


def test_a_vector_does_not_depend_on_its_neighbours() -> None:
    many = hashed_embeddings([f"text number {number} of many" for number in range(200)], 768)

    alone = hashed_embeddings(["text number 137 of many"], 768)

    np.testing.assert_array_equal(many[137], alone[0])


def test_no_texts_make_no_vectors() -> None:
    assert hashed_embeddings([], 768).shape == (0, 768)


def test_texts_that_share_words_or_parts_of_words_are_nearer() -> None:
    question, inflected, other = hashed_embeddings(
        ["how are wings tested", "testing of a wing", "boil the potatoes for ten minutes"], 1536
    )

    assert question @ inflected > question @ other + 0.05


async def test_the_models_name_is_its_dimension() -> None:
    embeddings = await provider().embed(model("hashed-384"), ["one"], timeout_seconds=1)

    assert embeddings.vectors.shape == (1, 384)
    with pytest.raises(DimensionMismatch):
        await provider().embed(model("hashed-384", 768), ["one"], timeout_seconds=1)
    for unknown in ("hashed-", "hashed-0", "hashed-x", "text-embedding-3-small", "echo"):
        with pytest.raises(ModelNotFound, match="hashed-768"):
            await provider().embed(model(unknown), ["one"], timeout_seconds=1)


async def test_the_echo_says_that_it_is_one() -> None:
    reply = await provider().complete(
        echo({"role": "user", "content": "first"}, {"role": "user", "content": [{"type": "text", "text": "last"}]})
    )

    assert "echo model" in reply.text
    assert "sekha.yaml" in reply.text
    assert reply.text.endswith("You said: last")


async def test_the_echo_keeps_to_max_tokens() -> None:
    reply = await provider().complete(echo({"role": "user", "content": "hello"}, max_tokens=4))

    assert reply.text == "I am Sekha's builtin"
    assert reply.usage is not None
    assert reply.usage.output_tokens == 4
    assert reply.finish_reason == "length"


async def test_an_echo_without_a_user_message_is_refused() -> None:
    with pytest.raises(ProviderRejected, match="no user message"):
        await provider().complete(echo({"role": "system", "content": "hello"}))
