"""`POST /api/v1/search`: what is stored and nearest to a question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from decimal import Decimal
from typing import Any, Literal, TypeGuard, get_args

from sekha.errors import InvalidRequest
from sekha.gateway.exchange import Exchange
from sekha.gateway.fields import dollars, flag, number, object_in, only, text, whole
from sekha.gateway.finished import UnderWay
from sekha.gateway.pages import say
from sekha.gateway.serving import BODY_MB, BODY_SECONDS, Serving
from sekha.gateway.weighing import BYTES_PER_TOKEN
from sekha.gateway.wire import MOST_DIMENSIONS, sekha_note, tags_of
from sekha.keys import Pass
from sekha.messages import kind_of
from sekha.registry import COLLECTION_NAME
from sekha.search import Found, SearchRequest
from sekha.search import search as search_in_order
from sekha.spaces import alias_of, names_index_of
from sekha.vectors.base import AllOf, AnyOf, Compare, Filter, Not, Scalar

__all__ = ["FIELDS", "OPERATORS", "search"]

FIELDS = (
    "query",
    "collection",
    "dimension",
    "limit",
    "where",
    "min_similarity",
    "hybrid",
    "explain",
    "max_cost",
    "metadata",
)
Operator = Literal["eq", "ne", "lt", "le", "gt", "ge", "in"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)

_MOST_RESULTS = 10_000
_DEEPEST = 16
_MOST_PARTS = 256


async def search(serving: Serving, x: Exchange) -> None:
    """Search a collection, each of its spaces under its own model."""
    key = serving.keys.owner(x.authorization)  # before a body is read for nobody
    body = await x.body(limit_mb=BODY_MB, timeout_seconds=BODY_SECONDS)
    by = serving.keys.admit(x.authorization, tokens=len(body) // BYTES_PER_TOKEN)
    by.check(serving.resources.registry, None, "embedding")
    given = object_in(body)
    request = _asked(given, serving, by)
    if key is not None and key.reads == "own" and _may_hold_memory(request.collection, serving):
        request = replace(request, where=_asked_by(key.name, request.where))
    explain = flag(given, "explain", default=False)
    under_way = x.under_way = UnderWay(serving, "search", request, by)
    try:
        found = await search_in_order(request, serving.search)
        cost = found.cost + under_way.lost_cost
        await say(x, _said(found, under_way.run_id, cost, explain=explain))
    except BaseException as error:
        under_way.failed(error)
        raise
    under_way.answered(found)


def _said(found: Found, run_id: str, cost: Decimal, *, explain: bool) -> dict[str, object]:
    return {
        "collection": found.collection,
        "results": [
            {
                "uuid": hit.uuid,
                "content": hit.text,
                "score": hit.score,
                "similarity": hit.similarity,
                "space": hit.space,
                "dimension": hit.dimension,
                "properties": dict(hit.properties),
                **({"ranks": asdict(hit.ranks)} if explain else {}),
            }
            for hit in found.hits
        ],
        "sekha": sekha_note(found, run_id, cost)
        | {
            "spaces": [
                {
                    "space": answer.space,
                    "dimension": answer.dimension,
                    "size": answer.size,
                    "seconds": round(answer.seconds, 6),
                    "provider_id": answer.provider_id,
                    "model_id": answer.model_id,
                    "cost": float(answer.cost),
                }
                for answer in found.answers
            ],
            "left_out": [{"space": each.space, "why": each.why} for each in found.left_out],
        },
    }


def _asked(given: Mapping[str, Any], serving: Serving, by: Pass) -> SearchRequest:
    only(given, FIELDS)
    memory = serving.resources.loaded.config.memory
    collection = text(given, "collection") or (memory.collection if memory else "documents")
    if not COLLECTION_NAME.fullmatch(collection):
        raise InvalidRequest(
            "`collection` must begin with a letter, and go on with letters, digits and underscores.",
            field="collection",
        )
    query = text(given, "query")
    if query is None:
        raise InvalidRequest("`query` is missing: say what to look for.", field="query")
    where = given.get("where")
    return SearchRequest(
        query=query,
        collection=collection,
        dimension=whole(given, "dimension", 1, MOST_DIMENSIONS),
        limit=whole(given, "limit", 1, _MOST_RESULTS) or 10,
        where=None if where is None else _Filters().read(where, "where"),
        min_similarity=number(given, "min_similarity", -1, 1),
        hybrid=flag(given, "hybrid", default=False),
        max_cost=dollars(given, "max_cost"),
        tags=tags_of(given.get("metadata")),
        key=by.key,
        allowed=by.allowed,
    )


def _may_hold_memory(collection: str, serving: Serving) -> bool:
    """Whether a search of the collection may come upon what passed the gateway."""
    memory = serving.resources.loaded.config.memory
    if memory is None:
        return False
    asked, kept = alias_of(collection), alias_of(memory.collection)
    # `Notes_8_of` would find what lies in `Notes_8_of_8`, an index of `notes` for a model of that name.
    return asked == kept or names_index_of(kept, asked) or names_index_of(asked, kept)


def _asked_by(key: str, where: Filter | None) -> Filter:
    """What the key asked itself, and of that what the caller wants."""
    own = Compare("key", "eq", key)
    return own if where is None else AllOf((own, where))


class _Filters:
    """Reads `where`: a comparison, or `all`, `any` and `not` of others."""

    def __init__(self) -> None:
        self._parts = 0

    def read(self, given: object, at: str, depth: int = 0) -> Filter:
        self._parts += 1
        if depth > _DEEPEST or self._parts > _MOST_PARTS:
            raise InvalidRequest(
                f"`where` may have {_MOST_PARTS} parts, {_DEEPEST} levels deep, at the most.", field="where"
            )
        match given:
            case {"all": list(parts), **rest} if not rest:
                return AllOf(tuple(self.read(part, f"{at}.all[{n}]", depth + 1) for n, part in enumerate(parts)))
            case {"any": list(parts), **rest} if not rest:
                return AnyOf(tuple(self.read(part, f"{at}.any[{n}]", depth + 1) for n, part in enumerate(parts)))
            case {"not": part, **rest} if not rest:
                return Not(self.read(part, f"{at}.not", depth + 1))
            case {"property": str(name), "operator": str(operator), "value": value, **rest} if not rest and name:
                return _comparison(name, operator, value, at)
            case _:
                raise InvalidRequest(
                    f"`{at}` must be {{property, operator, value}}, or {{all}}, {{any}} or {{not}} with others "
                    f"inside, not {kind_of(given)} of another form.",
                    field=at,
                )


def _comparison(name: str, operator: str, value: object, at: str) -> Compare:
    if not _is_operator(operator):
        raise InvalidRequest(f"`{at}.operator` must be one of {', '.join(OPERATORS)}.", field=f"{at}.operator")
    if operator == "in":
        if not isinstance(value, list) or not all(_is_scalar(each) for each in value):
            raise InvalidRequest(f"`{at}.value` must be a list of values for `in`.", field=f"{at}.value")
        return Compare(name, operator, tuple(value))
    if not _is_scalar(value):
        raise InvalidRequest(f"`{at}.value` must be one value, not {kind_of(value)}.", field=f"{at}.value")
    return Compare(name, operator, value)


def _is_operator(operator: str) -> TypeGuard[Operator]:
    return operator in OPERATORS


def _is_scalar(value: object) -> TypeGuard[Scalar]:
    return value is None or isinstance(value, str | int | float | bool)
