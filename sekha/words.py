"""Counting a text by its words: nearly every text is new, and nearly none of its words is."""

from __future__ import annotations

from collections.abc import Callable
from unicodedata import normalize

__all__ = ["ByWord"]

REMEMBERED = 16_384
"""Words remembered at the least, and twice as many at the most: less than ten megabytes."""
PIECE = 8192
"""Characters that are counted at once: a run of one character takes tiktoken the square of its length."""
LONGEST = 32
"""Characters of a word that is remembered; a longer one, as a rule, is never met again."""


class ByWord:
    """Counts just what `whole` counts, and the quicker the more of a text's words were met before.

    No tokenizer of ours joins what stands on both sides of a space: the space begins a piece of its own
    or together with the word behind it, and what a piece is depends on nothing before it. So a text is
    as many tokens as its words, each but the first with the space before it, as long as nothing but
    one space stands between any two. Every other text is counted as a whole, and one longer than
    `PIECE` in pieces, which adds at most a token at each seam.
    """

    def __init__(self, whole: Callable[[str], int]) -> None:
        self._whole = whole
        self._first = _Words(whole, "")
        self._later = _Words(whole, " ")

    def __call__(self, text: str) -> int:
        if len(text) > PIECE:
            return sum(self(text[start : start + PIECE]) for start in range(0, len(text), PIECE))
        first, space, rest = text.partition(" ")
        words = rest.split(" ") if space else ()
        # To count more new words than these one by one takes longer than the whole text does.
        self._first.room = 1
        self._later.room = 8 + len(words) // 8
        try:
            return self._first[first] + sum(map(self._later.__getitem__, words))
        except KeyError:
            return self._whole(text)


class _Words(dict[str, int]):
    """Word → its tokens. Raises `KeyError` for what cannot be counted by itself, and when there is no more room."""

    def __init__(self, whole: Callable[[str], int], before: str) -> None:
        super().__init__()
        self.room = 0
        """How many words more may be learned for the text that is being counted."""
        self._whole = whole
        self._before = before
        self._older: dict[str, int] = {}

    def __missing__(self, word: str) -> int:
        tokens = self._older.get(word)
        if tokens is None:
            self.room -= 1
            # Claude's tokenizer normalizes first, which makes a space of the beginning of some characters.
            plain = normalize("NFKC", word)
            if self.room < 0 or not plain or plain[0].isspace() or plain[-1].isspace():
                raise KeyError
            tokens = self._whole(self._before + word)
            if len(word) > LONGEST:
                return tokens
        if len(self) >= REMEMBERED:
            self._older = dict(self)
            self.clear()
        self[word] = tokens
        return tokens
