"""Addresses: as messages may show them, and who can reach them."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit, urlunsplit

__all__ = ["is_loopback", "without_secrets"]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there: `localhost`, `::1` and all of 127.0.0.0/8."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def without_secrets(url: str) -> str:
    """The address without a password, and without a query, which may carry a key."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(cannot be shown)"
    user, at, host = parts.netloc.rpartition("@")
    shown = f"{user.partition(':')[0]}:***@{host}" if at else host
    return urlunsplit((parts.scheme, shown, parts.path, "***" if parts.query else "", ""))
