"""Heads of requests that a connection has seen, so that the next like them need not be parsed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from sekha.gateway.exchange import Exchange

__all__ = ["MOST_DIGITS", "Head", "plain_head"]

MOST_DIGITS = 10
_MOST_BYTES = 4096
"""Of a head that is kept: a connection takes no more memory for it than for its buffers."""
# Lines that end in one way only, so that there are no two opinions on where a head ends and what its length is.
_PLAIN = re.compile(
    rb"([^\r\n]++\r\n(?:[^\r\n]++\r\n)*?content-length: )([0-9]{1,%d})(\r\n(?:[^\r\n]++\r\n)*\r\n)" % MOST_DIGITS,
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Head:
    """What a head said that was valid, and its bytes before and after the digits of its body's length."""

    method: str
    path: str
    query: bytes
    authorization: bytes | None = field(repr=False)
    before: bytes = field(repr=False)
    after: bytes = field(repr=False)


def plain_head(raw: bytes, length: bytes, x: Exchange) -> Head | None:
    """The head at the beginning of `raw`, of which `x` was made; None for one that is not plain.

    Whatever begins with the bytes before, has any digits, and goes on with the bytes after, differs in the length of
    its body and in nothing else.
    """
    found = _PLAIN.match(raw, 0, _MOST_BYTES)
    if found is None or found[2] != length:
        return None
    return Head(x.method, x.path, x.query, x.authorization, found[1], found[3])
