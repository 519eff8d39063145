"""What a provider of OpenAI's protocol reports that a call used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sekha.pricing import MOST_TOKENS, Usage

__all__ = ["half_in", "is_half", "joined", "usage_in", "with_the_rest"]

_NO_DETAILS: dict[str, Any] = {}


def usage_in(reported: object, *, replies: bool = True, by_total: bool = True, tier: object = None) -> Usage | None:
    """No real call takes no tokens in, so zero is no report of them; and none takes more than any model could.

    What comes out may go unsaid where nothing needs to, as where there are no `replies`, and either half where the
    rest follows `by_total`. The `tier` is what the answer names beside it.
    """
    if not isinstance(reported, dict):
        return None
    went_in, came_out = reported.get("prompt_tokens"), reported.get("completion_tokens")
    if type(went_in) is not int or type(came_out) is not int or went_in <= 0 or came_out < 0:
        if not by_total:
            return None
        went_in, came_out = _by_the_total(reported, came_out) if replies or came_out is not None else _all_in(reported)
    elif type(total := reported.get("total_tokens")) is int and total > went_in + came_out:
        went_in, came_out = _with_the_rest(reported, went_in, came_out, total) if replies else (total, 0)
    if not 0 < went_in + came_out <= MOST_TOKENS:
        return None
    read, written = _cached(reported)
    cached = min(_count(read), went_in) if read else 0
    return Usage(
        input_tokens=went_in,
        output_tokens=came_out,
        cached_tokens=cached,
        cache_write_tokens=min(_count(written), went_in - cached) if written else 0,
        tier=tier if isinstance(tier, str) else None,
    )


def is_half(usage: Usage, *, said: bool) -> bool:
    """Whether a report lacks what went in, which no call is without, or what came out where something was `said`."""
    return not usage.input_tokens or (said and not usage.output_tokens)


def half_in(reported: object, *, tier: object = None) -> Usage | None:
    """What is named in a report that is no whole one, zero for the half that is not; None where nothing is."""
    if not isinstance(reported, dict):
        return None
    went_in, came_out = _count(reported.get("prompt_tokens")), _count(reported.get("completion_tokens"))
    if not 0 < went_in + came_out <= MOST_TOKENS:
        return None
    read, written = map(_count, _cached(reported))
    cached = min(read, went_in)
    return Usage(
        input_tokens=went_in,
        output_tokens=came_out,
        cached_tokens=cached,
        cache_write_tokens=min(written, went_in - cached),
        tier=tier if isinstance(tier, str) else None,
    )


def joined(one: Usage | None, other: Usage | None) -> Usage | None:
    """What two reports of one call say together: of each half the more."""
    if one is None or other is None:
        return one or other
    longer = one if one.input_tokens >= other.input_tokens else other
    came_out = max(one.output_tokens, other.output_tokens)
    return replace(longer, output_tokens=came_out, tier=other.tier or one.tier)


def _cached(reported: Mapping[str, Any]) -> tuple[Any, Any]:
    """What was read from the cache and what was written to it, as it is reported."""
    details = reported.get("prompt_tokens_details")
    if not isinstance(details, dict):
        details = _NO_DETAILS
    # OpenAI's and OpenRouter's names first; then those of others who speak their protocol.
    read = (
        details.get("cached_tokens")
        or reported.get("cache_read_input_tokens")
        or reported.get("prompt_cache_hit_tokens")
    )
    return read, details.get("cache_write_tokens") or reported.get("cache_creation_input_tokens")


def _by_the_total(reported: Mapping[str, Any], came_out: object) -> tuple[int, int]:
    """What went in and came out, where one of them is missing or no number; zeros where the total does not tell."""
    total, known_in, known_out = _count(reported.get("total_tokens")), _count(reported.get("prompt_tokens")), came_out
    if type(known_out) is int and known_out >= 0:
        went_in = known_in or total - known_out
        return (went_in, known_out) if went_in > 0 else (0, 0)
    return (known_in, total - known_in) if 0 < known_in < total else (0, 0)


def _all_in(reported: Mapping[str, Any]) -> tuple[int, int]:
    """What went in where nothing comes out."""
    return max(_count(reported.get("prompt_tokens")), _count(reported.get("total_tokens"))), 0


def _with_the_rest(reported: Mapping[str, Any], went_in: int, came_out: int, total: int) -> tuple[int, int]:
    details = reported.get("completion_tokens_details")
    thought = _count(details.get("reasoning_tokens")) if isinstance(details, dict) else 0
    return with_the_rest(went_in, came_out, total, cached=sum(map(_count, _cached(reported))), thought=thought)


def with_the_rest(went_in: int, came_out: int, total: int, *, cached: int, thought: int) -> tuple[int, int]:
    """What went in and came out, where the total is more: it is of all that is billed.

    xAI and Gemini count thoughts apart from what came out, Gemini without another word of them; others tokens of
    the cache apart from what went in. What nobody explains counts as the dearer of both, which is what came out.
    """
    rest = total - went_in - came_out
    if rest == cached and rest != thought:
        return went_in + rest, came_out
    return went_in, came_out + rest


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
