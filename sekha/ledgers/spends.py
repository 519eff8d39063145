"""What was spent, on record once: each call by itself, or many of one scope and minute together.

A row of `ledger_spends` is one call, or what the calls of one process in one scope and minute cost together:
a gateway makes thousands a second, and nothing that is asked of them needs each by itself. Such sums
have no id that would show that a call was recorded before. What they were made of is counted in the process's
journal instead, and `ledger_journals` says up to where that is on record.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, TypeAlias

from sekha.ledger import GroupBy, Scope, Spend, Spent
from sekha.ledgers.database import Transaction, Value, chunks, insert
from sekha.ledgers.encoding import DAY, EPOCH, HOUR, MOST, matches_of, micros_of, picos, spans_of, storable, to_dollars
from sekha.ledgers.totals import add_to_totals

__all__ = [
    "REPLIES_AT_ONCE",
    "Batch",
    "Tally",
    "forget",
    "record",
    "record_all",
    "record_batch",
    "record_upto",
    "reply_length",
    "report",
    "usual_output_tokens",
]

REPORT_SECONDS = 60.0
LAST_REPLIES = 200
"""As many replies say how long a model's usually are."""
REPLIES_AT_ONCE = 10
"""So many of a model's are taken from one batch's tallies: a busy model's last 200 would be from a fraction of a
second, and to write them all down would take longer than the rest of the batch."""
_TIDIED = 50
"""One in so many spends, picked by its microseconds, also forgets replies. Each would take a third longer by that."""
_TIDIED_TALLIES = 8
"""The same of tallies, of which each brings a few replies."""
_HUGE = 2**54


class Tally:
    """What calls of one process in one scope and minute cost together, in picos and tokens."""

    __slots__ = (
        "at", "cached_tokens", "calls", "cost", "counted", "estimated", "id", "images", "input_tokens", "output_tokens",
        "replies", "scope",
    )  # fmt: skip

    def __init__(self, identity: str, scope: Scope, at: datetime, *, counted: bool) -> None:
        self.id = identity
        """The same for all that is recorded of this scope and minute: it is added up there."""
        self.scope = scope
        self.at = at
        """When the first of the calls was made."""
        self.counted = counted
        self.calls = self.cost = self.estimated = 0
        self.input_tokens = self.output_tokens = self.cached_tokens = self.images = 0
        self.replies: deque[tuple[datetime, int]] = deque(maxlen=REPLIES_AT_ONCE)
        """When the last calls were made, and how many tokens came out."""


class Batch(NamedTuple):
    """What a process spent, to be recorded together."""

    upto: int
    """How many spends the process's journal had when the last of these was in it: recorded up to there once."""
    tallies: Sequence[Tally]
    spends: Sequence[Spend]
    """Those that are recorded each by itself, under its own id."""


def record(transaction: Transaction, spend: Spend) -> bool:
    """Write a spend and count it into every total that covers it; False when it was written before."""
    cost = picos(spend.cost)
    new = transaction.changed(f"{_INSERT_SPENDS} {_ROW} ON CONFLICT (id) DO NOTHING", *_row(spend))
    if not new:
        return False
    for tag in sorted(spend.scope.tags):
        transaction.changed("INSERT INTO ledger_tags (spend, tag) VALUES (?, ?)", spend.id, storable(tag))
    _note_replies(transaction, _replies_of(spend), tidy=micros_of(spend.at) % _TIDIED == 0)
    matches, spans = matches_of(spend.scope), spans_of(micros_of(spend.at) // HOUR)
    totals = transaction.rows(
        "SELECT 1 FROM ledger_totals WHERE match IN ? AND span IN ? ORDER BY match, span FOR UPDATE", matches, spans
    )
    if totals and cost:
        transaction.changed(
            "UPDATE ledger_totals SET spent = spent + ? WHERE match IN ? AND span IN ?", cost, matches, spans
        )
    return True


def record_batch(transaction: Transaction, owner: str, batch: Batch | None) -> tuple[bool, frozenset[str]]:
    """Write what a process spent; whether its tallies were new, and the ids of the other spends that were."""
    if batch is None:
        return False, frozenset()
    tallied = record_upto(transaction, owner, batch.upto) and bool(batch.tallies)
    if tallied:
        _record_tallies(transaction, batch.tallies, batch.upto)
    return tallied, record_all(transaction, batch.spends)


def record_upto(transaction: Transaction, owner: str, upto: int) -> bool:
    """Note that so many of a journal's spends are on record; False when they were before."""
    return bool(
        transaction.changed(
            "INSERT INTO ledger_journals (process, recorded) VALUES (?, ?) ON CONFLICT (process) "
            "DO UPDATE SET recorded = excluded.recorded WHERE ledger_journals.recorded < excluded.recorded",
            owner,
            upto,
        )
    )


def forget(transaction: Transaction, *, owner: str) -> None:
    transaction.changed("DELETE FROM ledger_journals WHERE process = ?", owner)


def record_all(transaction: Transaction, spends: Sequence[Spend]) -> frozenset[str]:
    """Write spends and count them into the totals that cover them; the ids of those that were new."""
    # In one order, so that two who record the same ones wait for each other but never in a circle.
    ordered = sorted(spends, key=lambda spend: spend.id)
    new: set[str] = set()
    for some in chunks(ordered):
        written = transaction.rows(_insert_or_leave(len(some)), *chain.from_iterable(map(_row, some)))
        new.update(row[0] for row in written)
    if not new:
        return frozenset()
    recorded = list({spend.id: spend for spend in reversed(ordered) if spend.id in new}.values())
    tags = [(spend.id, storable(tag)) for spend in recorded for tag in sorted(spend.scope.tags)]
    insert(transaction, "ledger_tags (spend, tag)", tags)
    _note_replies(transaction, [reply for spend in recorded for reply in _replies_of(spend)])
    add_to_totals(transaction, [(micros_of(spend.at), spend.scope, picos(spend.cost)) for spend in recorded])
    return frozenset(new)


def _record_tallies(transaction: Transaction, tallies: Sequence[Tally], upto: int) -> None:
    rows = {str(row[0]): (row, tally) for tally in tallies for row in [_tally_row(tally, upto)]}
    tags: list[tuple[Value, ...]] = []
    for some in chunks(sorted(rows)):
        written = transaction.rows(_upsert(len(some)), *chain.from_iterable(rows[identity][0] for identity in some))
        for identity, calls in written:
            tally = rows[identity][1]
            if tally.scope.tags and calls == tally.calls:
                tags += [(identity, storable(tag)) for tag in sorted(tally.scope.tags)]
    insert(transaction, "ledger_tags (spend, tag)", tags)
    replies = [reply for tally in tallies for reply in _replies_of(tally)]
    tidy = any(micros_of(tally.at) % _TIDIED_TALLIES == 0 for tally in tallies)
    _note_replies(transaction, replies, REPLIES_AT_ONCE, tidy=tidy)
    add_to_totals(transaction, [(micros_of(tally.at), tally.scope, tally.cost) for tally in tallies])


_SUMS = ("calls", "cost", "estimated", "input_tokens", "output_tokens", "cached_tokens", "images")
_COLUMNS = f"id, at, provider, model, task, key, counted, {', '.join(_SUMS)}"
_INSERT_SPENDS = f"INSERT INTO ledger_spends ({_COLUMNS}) VALUES"
_ROW = f"({', '.join('?' * len(_COLUMNS.split(',')))})"


def _row(spend: Spend) -> tuple[str | int | None, ...]:
    usage = spend.usage
    return (
        spend.id,
        micros_of(spend.at),
        *_stored(spend.scope),
        int(usage.counted),
        1,
        picos(spend.cost),
        picos(spend.estimated),
        min(usage.input_tokens, MOST),
        min(usage.output_tokens, MOST),
        min(usage.cached_tokens, MOST),
        min(usage.images, MOST),
    )


def _tally_row(tally: Tally, upto: int) -> tuple[str | int | None, ...]:
    sums = [min(getattr(tally, name), MOST) for name in _SUMS]
    # Databases fail to add up beyond 64 bits: what is absurdly large stays by itself.
    identity = tally.id if max(sums) < _HUGE else f"{tally.id}+{upto}"
    return (identity, micros_of(tally.at), *_stored(tally.scope), int(tally.counted), *sums)


@lru_cache(maxsize=256)
def _stored(scope: Scope) -> tuple[str | None, ...]:
    """Whom a spend is charged to, as its row says it."""
    return tuple(map(storable, (scope.provider, scope.model, scope.task, scope.key)))


@lru_cache
def _insert_or_leave(spends: int) -> str:
    return f"{_INSERT_SPENDS} {', '.join([_ROW] * spends)} ON CONFLICT (id) DO NOTHING RETURNING id"


@lru_cache
def _upsert(tallies: int) -> str:
    sums = ", ".join(f"{name} = ledger_spends.{name} + excluded.{name}" for name in _SUMS)
    return f"{_INSERT_SPENDS} {', '.join([_ROW] * tallies)} ON CONFLICT (id) DO UPDATE SET {sums} RETURNING id, calls"


_Reply: TypeAlias = tuple[str, str, int, int]
"""Provider, model, when in micros, and tokens that came out."""


def _replies_of(what: Spend | Tally) -> list[_Reply]:
    provider, model, _, _ = _stored(what.scope)
    if provider is None or model is None:
        return []
    replies = [(what.at, reply_length(what))] if isinstance(what, Spend) else what.replies
    return [(provider, model, micros_of(at), min(tokens, MOST)) for at, tokens in replies if tokens > 0]


def reply_length(spend: Spend) -> int:
    """Tokens of one reply; 0 where there is none to learn from."""
    tokens, replies = spend.usage.output_tokens, spend.replies
    return tokens if replies == 1 else -(-tokens // replies) if replies else 0


def _note_replies(
    transaction: Transaction, replies: Sequence[_Reply], most: int = LAST_REPLIES, *, tidy: bool = True
) -> None:
    """Write down how long the last replies of each model were, so many at the most; to `tidy`, forget those before."""
    by_model: dict[tuple[str, str], list[_Reply]] = {}
    for reply in replies:
        by_model.setdefault(reply[:2], []).append(reply)
    for (provider, model), found in sorted(by_model.items()):
        insert(transaction, "ledger_replies (provider, model, at, output_tokens)", sorted(found)[-most:])
        if not tidy:
            continue
        transaction.changed(
            "DELETE FROM ledger_replies WHERE (provider, model, at) IN (SELECT provider, model, at FROM ledger_replies "
            "WHERE provider = ? AND model = ? AND at < (SELECT min(at) FROM (SELECT at FROM ledger_replies "
            "WHERE provider = ? AND model = ? ORDER BY at DESC LIMIT ?) AS newest) FOR UPDATE SKIP LOCKED)",
            provider,
            model,
            provider,
            model,
            LAST_REPLIES,
        )


def usual_output_tokens(transaction: Transaction, *, provider: str, model: str) -> int | None:
    rows = transaction.rows(
        "SELECT output_tokens FROM ledger_replies WHERE provider = ? AND model = ? ORDER BY at DESC LIMIT ?",
        provider,
        model,
        LAST_REPLIES,
    )
    if len(rows) < 10:
        return None
    lengths = sorted(int(row[0]) for row in rows)
    return lengths[math.ceil(0.95 * len(lengths)) - 1]


_GROUPS: Mapping[GroupBy, str] = {
    "provider": "provider",
    "model": "model",
    "task": "task",
    "key": "key",
    "tag": "tag",
    "day": f"at / {DAY}",
}


def report(transaction: Transaction, *, by: GroupBy, since: datetime | None) -> list[Spent]:
    transaction.take_long(REPORT_SECONDS)
    tags = "LEFT JOIN ledger_tags ON spend = id" if by == "tag" else ""
    rows = transaction.rows(
        f"SELECT {_GROUPS[by]}, sum(calls), sum(cost), sum(estimated), sum(input_tokens), sum(output_tokens) "  # noqa: S608 - both from this file
        f"FROM ledger_spends {tags} WHERE at >= ? GROUP BY 1",
        0 if since is None else micros_of(since),
    )
    lines = [
        Spent(
            group=(EPOCH + timedelta(days=group)).date().isoformat() if by == "day" else group or "",
            calls=int(calls),
            cost=to_dollars(cost),
            estimated=to_dollars(estimated),
            input_tokens=int(input_tokens),
            output_tokens=int(output_tokens),
        )
        for group, calls, cost, estimated, input_tokens, output_tokens in rows
    ]
    return sorted(lines, key=lambda line: (-line.cost, line.group))
