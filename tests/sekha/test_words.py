from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekha.tokens import count_text, tokenizer_of
from sekha.words import LONGEST, REMEMBERED, ByWord

# What decides where a tokenizer splits: spaces of all sorts, marks that join, letters that contract, numbers.
SPACES = " \t\n\r\x1c\x85\xa0\u1680\u2003\u2028\u3000\u180e\u200b\ufeff"
STRANGE = SPACES + "\u0301\u0308\xa8\xb4\ud800'/.,<|>sStT\xe9東ǅªⅧ7\U0001f600"
WORDS = ["it's", "Hello,", "DON'T", "<EOT>", "a\n\nb", "end.\n", "\xa8x", "12345", "https://example.com/a/b"]
texts = st.lists(st.text(max_size=6) | st.text(STRANGE, max_size=6) | st.sampled_from(WORDS), max_size=12).map(" ".join)


@cache
def at_once(model: str) -> Callable[[str], int]:
    """What splits a whole text."""
    name = tokenizer_of(model).name
    spec = find_spec("litellm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0], "litellm_core_utils", "tokenizers")
    if name == "claude":
        from tokenizers import Tokenizer

        claude = Tokenizer.from_file(str(folder / "anthropic_tokenizer.json"))
        return lambda text: len(claude.encode(text.encode(errors="replace").decode(), add_special_tokens=False).ids)
    import tiktoken

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TIKTOKEN_CACHE_DIR", str(folder))  # it would fetch what is not there
        encoding = tiktoken.get_encoding(name)
    return lambda text: len(encoding.encode_ordinary(text))


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4", "text-davinci-003", "claude-2"])
def test_a_text_is_as_many_tokens_as_when_it_is_split_at_once(model: str) -> None:
    split = at_once(model)

    @given(texts)
    def compare(text: str) -> None:
        assert count_text(text, model) == split(text)

    compare()


class Counted:
    """Counts characters, and how often it is asked."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> int:
        self.texts.append(text)
        return len(text)


def test_a_word_is_split_once() -> None:
    whole = Counted()
    count = ByWord(whole)

    counts = [count("say hello"), count("say hello"), count("say good day"), count("good hello")]

    assert counts == [9, 9, 12, 10]
    assert whole.texts == ["say", " hello", " good", " day", "good"]


@pytest.mark.parametrize("text", ["two  spaces", " before", "after ", "a\n b", "a \tb", "", "a \xa8b"])
def test_a_text_with_more_than_one_space_between_words_is_split_at_once(text: str) -> None:
    whole = Counted()

    assert ByWord(whole)(text) == len(text)
    assert whole.texts[-1] == text


def test_a_text_of_new_words_is_split_at_once_and_some_of_them_are_learned() -> None:
    whole = Counted()
    text = " ".join(map(str, range(1000)))

    ByWord(whole)(text)

    assert whole.texts[-1] == text
    assert len(whole.texts) < 200


def test_a_long_word_is_not_remembered() -> None:
    whole = Counted()
    count, word = ByWord(whole), "x" * (LONGEST + 1)

    assert count(f"a {word}") + count(f"a {word}") == 2 * (LONGEST + 3)
    assert whole.texts.count(f" {word}") == 2


def test_words_are_forgotten_unless_they_are_met_again_and_again() -> None:
    whole = Counted()
    count = ByWord(whole)

    count("the once")
    for number in range(3 * REMEMBERED):
        count(f"the {number}")
    whole.texts.clear()
    count("the once")

    assert whole.texts == [" once"]
