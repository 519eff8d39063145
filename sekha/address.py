"""Addresses: as messages may show them, and who can reach them."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit, urlunsplit

__all__ = ["WRONG_PORT", "has_wrong_port", "is_loopback", "without_secrets"]

WRONG_PORT = (
    "names a port that is no number from 1 to 65535. Write `postgresql://user@host:5432/database`, and in a password "
    "`%3A`, `%2F` and `%40` for `:`, `/` and `@`."
)
"""Said of a ledger's address. The port stays out of it: it may be half of a password."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there: `localhost`, `::1` and all of 127.0.0.0/8."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def has_wrong_port(url: str) -> bool:
    """Whether a database's address, which may name several hosts, has something for a port that is none."""
    try:
        hosts = urlsplit(url).netloc.rpartition("@")[2].split(",")
    except ValueError:
        return True
    ports = [host.rpartition("]")[2].partition(":")[2] for host in hosts]
    return not all(not port or _is_port(port) for port in ports)


def _is_port(written: str) -> bool:
    # PostgreSQL passes over zeros in front, and Python makes no number of thousands of digits.
    digits = written.lstrip("0")[:6]
    return digits.isascii() and digits.isdigit() and int(digits) <= 65_535


def without_secrets(url: str) -> str:
    """The address without a password, and without a query, which may carry a key."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(cannot be shown)"
    user, at, host = parts.netloc.rpartition("@")
    shown = f"{user.partition(':')[0]}:***@{host}" if at else host
    return urlunsplit((parts.scheme, shown, parts.path, "***" if parts.query else "", ""))
