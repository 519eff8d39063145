"""Who may use the gateway: keys that are kept as hashes, and what each may do."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from sekha.errors import Unauthenticated
from sekha.registry import Task

__all__ = ["Key", "Keyring", "hash_of", "new_key"]

_PREFIX = "sk-sekha-"
_HASH = "sha256:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One caller's key. Empty `models` and `tasks` allow all."""

    name: str
    hash: str
    models: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ()
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


def new_key() -> str:
    """A new key: 256 bits of chance, shown once and kept by nobody but its owner."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """What sekha.yaml keeps of a key. One round is enough: there are no weak keys to guess."""
    return _HASH + hashlib.sha256(key.encode()).hexdigest()


class Keyring:
    """The keys of one configuration. Without any, everybody is let in."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._by_digest = {bytes.fromhex(key.hash.removeprefix(_HASH)): key for key in keys}

    def __bool__(self) -> bool:
        return bool(self._by_digest)

    def owner(self, authorization: bytes | None) -> Key | None:
        """Whose key the header carries; None when there are no keys at all. Raises `Unauthenticated`."""
        if not self._by_digest:
            return None
        if authorization is None or authorization[:7].lower() != b"bearer ":
            raise Unauthenticated(given=False)
        # Looked up by its hash, so that the time it takes says nothing about the keys that there are.
        digest = hashlib.sha256(authorization[7:].strip()).digest()
        key = self._by_digest.get(digest)
        if key is None or not hmac.compare_digest(bytes.fromhex(key.hash.removeprefix(_HASH)), digest):
            raise Unauthenticated(given=True)
        return key
