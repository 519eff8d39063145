"""Heads of requests that a connection has seen."""

from __future__ import annotations

from dataclasses import dataclass, field

from sekha.gateway.exchange import Exchange
from sekha.plain_heads import PlainHead, plain_head

__all__ = ["Head", "head_of"]


@dataclass(frozen=True, slots=True)
class Head:
    """What a head said that was valid, and its bytes."""

    method: str
    path: str
    query: bytes
    authorization: bytes | None = field(repr=False)
    plain: PlainHead = field(repr=False)


def head_of(raw: bytes, length: bytes, x: Exchange) -> Head | None:
    """The head at the beginning of `raw`, of which `x` was made; None for one that is not plain."""
    plain = plain_head(raw, length)
    return None if plain is None else Head(x.method, x.path, x.query, x.authorization, plain)
