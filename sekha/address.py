"""Addresses as messages may show them."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

__all__ = ["without_secrets"]


def without_secrets(url: str) -> str:
    """The address without a password, and without a query, which may carry a key."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(cannot be shown)"
    user, at, host = parts.netloc.rpartition("@")
    shown = f"{user.partition(':')[0]}:***@{host}" if at else host
    return urlunsplit((parts.scheme, shown, parts.path, "***" if parts.query else "", ""))
