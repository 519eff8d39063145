"""Heads of HTTP messages that a connection has seen, so that the next like them need not be parsed.

Who keeps a connection sends the same head again and again, but for the length of the body. What begins with the
bytes before that length, has any digits, and goes on with the bytes after, differs in the length of its body and in
nothing else.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["PlainHead", "plain_head"]

_MOST_DIGITS = 10
_MOST_BYTES = 4096
"""Of a head that is kept: a connection takes no more memory for it than for its buffers."""
# Lines that end in one way only, so that there are no two opinions on where a head ends and what its length is.
_PLAIN = re.compile(
    rb"([^\r\n]++\r\n(?:[^\r\n]++\r\n)*?content-length: )([0-9]{1,%d})(\r\n(?:[^\r\n]++\r\n)*\r\n)" % _MOST_DIGITS,
    re.IGNORECASE,
)


class PlainHead(NamedTuple):
    """A head's bytes before and after the digits of its body's length."""

    before: bytes
    after: bytes

    def body_of(self, data: bytes) -> tuple[int, int] | None:
        """Where the body begins in a message that has this head, and how long it is; None for any other head."""
        before, after = self
        if not data.startswith(before):
            return None
        start = len(before)
        end = data.find(b"\r", start, start + _MOST_DIGITS + 1)
        digits = data[start:end]
        if end < 0 or not digits.isdigit() or not data.startswith(after, end):
            return None
        return end + len(after), int(digits)


def plain_head(raw: bytes, length: bytes) -> PlainHead | None:
    """The head at the beginning of `raw`, whose `content-length` was read as this; None for one that is not plain."""
    found = _PLAIN.match(raw, 0, _MOST_BYTES)
    if found is None or found[2] != length:
        return None
    # Copies, since they are kept and `raw` may be large.
    return PlainHead(found[1], found[3])
