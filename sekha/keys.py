"""Who may use the gateway: keys that are kept as hashes, and what each may do."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sekha.asks import Allowed
from sekha.errors import KeyLimited, KeyNotAllowed, OperatorsOnly, TooManyTokens, Unauthenticated
from sekha.rates import Minutes, RateLimit, Taken
from sekha.registry import TASKS, Registry, Task

__all__ = ["EVERYBODY", "KEY_PREFIX", "Key", "Keyring", "Pass", "hash_of", "new_key", "without_keys"]

KEY_PREFIX = "sk-sekha-"
"""Every key that we make begins with it, so that one is known where it does not belong."""
_KEYS = re.compile(KEY_PREFIX + r"[\w-]+")
_HASH = "sha256:"
_SEEN = 1024
_SEEN_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One caller's key. Empty `models` and `tasks` allow all."""

    name: str
    hash: str
    models: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ()
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    reads: Literal["own", "all"] = "own"
    operator: bool = False

    @property
    def allowed(self) -> Allowed | None:
        """What routing may choose from for it; None for everything."""
        if not self.models and not self.tasks:
            return None
        return Allowed(frozenset(self.models), frozenset(self.tasks))


class Pass(NamedTuple):
    """One request that was let in: for whom, and what it took of the key's limits."""

    key: str | None = None
    allowed: Allowed | None = None
    limit: RateLimit | None = None
    taken: Taken | None = None

    def used(self, tokens: int) -> None:
        """Count the tokens that it really had."""
        if self.limit is not None and self.taken is not None:
            self.limit.correct(self.taken, tokens)

    def room(self, sure: int, guess: int) -> int:
        """What a request of a key with limits is taken for that has so many tokens, and by a guess so many more.

        No guess keeps it out of a minute in which nothing has passed.
        """
        most = math.inf if self.limit is None else self.limit.tokens_per_minute
        return sure + guess if sure + guess <= most else max(sure, int(most))

    def check(self, registry: Registry, model: str | None, task: str | None) -> None:
        """Raise `KeyNotAllowed` for a model or task that was asked for by name and is not this key's to use."""
        if self.allowed is None or self.key is None:
            return
        tasks = self.allowed.tasks
        asked = task or (model if model in TASKS else None)
        if asked is not None:
            if tasks and asked not in tasks:
                raise KeyNotAllowed(self.key, asked, sorted(tasks))
        elif model not in (None, "auto") and not any(map(self.allowed.covers, registry.named(model))):
            raise KeyNotAllowed(self.key, model, self.allowed.instead_of(registry.named(model)))


EVERYBODY = Pass()


def new_key() -> str:
    """A new key: 256 bits of chance, shown once and kept by nobody but its owner."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def without_keys(text: str) -> str:
    """Text that a caller wrote, for the records: whoever puts a key where it does not belong has made a mistake."""
    return _KEYS.sub(KEY_PREFIX + "***", text)


def hash_of(key: str) -> str:
    """What sekha.yaml keeps of a key. One round is enough: there are no weak keys to guess."""
    return _HASH + hashlib.sha256(key.encode()).hexdigest()


class _Known(NamedTuple):
    key: Key
    allowed: Allowed | None
    limit: RateLimit | None
    digest: bytes


class Keyring:
    """The keys of one configuration. Without any, everybody is let in."""

    def __init__(
        self, keys: Iterable[Key], *, clock: Callable[[], float] = time.monotonic, minutes: Minutes | None = None
    ) -> None:
        """`minutes` have what passed under the configuration before, and what other processes let pass."""
        minutes = minutes or Minutes()
        self._by_digest: dict[bytes, _Known] = {}
        for key in keys:
            limit = None
            if key.requests_per_minute is not None or key.tokens_per_minute is not None:
                limit = RateLimit(
                    clock=clock,
                    requests_per_minute=key.requests_per_minute,
                    tokens_per_minute=key.tokens_per_minute,
                    minute=minutes.of(f"key:{key.name}"),
                )
            digest = bytes.fromhex(key.hash.removeprefix(_HASH))
            self._by_digest[digest] = _Known(key, key.allowed, limit, digest)
        self._has_operators = any(each.key.operator for each in self._by_digest.values())
        self._seen: dict[bytes, _Known] = {}
        """Headers that were let in, so that a key is hashed once and not with each request."""

    def __bool__(self) -> bool:
        return bool(self._by_digest)

    def owner(self, authorization: bytes | None) -> Key | None:
        """Whose key the header carries; None when there are no keys at all. Raises `Unauthenticated`."""
        found = self._look_up(authorization)
        return None if found is None else found.key

    def is_operator(self, authorization: bytes | None) -> bool:
        """Whether the key is an operator's, as each is where the file marks none. Raises `Unauthenticated`."""
        key = self.owner(authorization)
        return key is None or key.operator or not self._has_operators

    def check_operator(self, authorization: bytes | None, page: str) -> None:
        """Raise `OperatorsOnly` for the key of somebody who may not see a page, and `Unauthenticated`."""
        if not self.is_operator(authorization) and (key := self.owner(authorization)) is not None:
            raise OperatorsOnly(key.name, page)

    def known(self, authorization: bytes | None) -> Pass:
        """Whose request it is, before anything is taken of the key's limits. Raises `Unauthenticated`."""
        found = self._look_up(authorization)
        return EVERYBODY if found is None else Pass(found.key.name, found.allowed, found.limit)

    def admit(self, authorization: bytes | None, *, tokens: int) -> Pass:
        """Let a request of about so many tokens in. Raises `Unauthenticated`, `KeyLimited` and `TooManyTokens`."""
        found = self._look_up(authorization)
        if found is None:
            return EVERYBODY
        key, allowed, limit, _ = found
        return self.weigh(Pass(key.name, allowed, limit), tokens)

    def weigh(self, by: Pass, tokens: int, guess: int = 0) -> Pass:
        """Let a request in at what it is now known to be, in place of what it was taken for: one of so many tokens,
        and by a guess of so many more. Raises `KeyLimited` and `TooManyTokens`, and then it took nothing.
        """
        limit = by.limit
        if limit is None:
            return by
        if by.taken is not None:
            limit.give_back(by.taken)
        weight = by.room(tokens, guess)
        wait = limit.wait(weight)
        if wait == math.inf:
            raise TooManyTokens(str(by.key), f"{tokens:,} tokens", f"{limit.tokens_per_minute:,} in a minute")
        if wait:
            raise KeyLimited(str(by.key), _limits_of(limit), retry_after_seconds=wait)
        return by._replace(taken=limit.take(weight))

    def _look_up(self, authorization: bytes | None) -> _Known | None:
        if not self._by_digest:
            return None
        if authorization is None:
            raise Unauthenticated(given=False)
        # A dictionary compares only what has the same hash, which is salted: neither does this tell by its time.
        found = self._seen.get(authorization)
        if found is None:
            found = self._check(authorization)
            if len(authorization) <= _SEEN_BYTES:
                if len(self._seen) >= _SEEN:
                    self._seen.clear()
                self._seen[authorization] = found
        return found

    def _check(self, authorization: bytes) -> _Known:
        if authorization[:7].lower() != b"bearer ":
            raise Unauthenticated(given=False)
        # Looked up by its hash, so that the time it takes says nothing about the keys that there are.
        digest = hashlib.sha256(authorization[7:].strip()).digest()
        found = self._by_digest.get(digest)
        if found is None or not hmac.compare_digest(found.digest, digest):
            raise Unauthenticated(given=True)
        return found


def _limits_of(limit: RateLimit) -> str:
    limits = [(limit.requests_per_minute, "requests"), (limit.tokens_per_minute, "tokens")]
    return " or ".join(f"{most:,} {what}" for most, what in limits if most != math.inf) + " a minute"
