"""What an operator asks: models, routes, searches, costs, health and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import orjson

from sekha.errors import InvalidRequest
from sekha.gateway.exchange import Exchange
from sekha.gateway.serving import Serving
from sekha.registry import TASKS, Model

if TYPE_CHECKING:
    from sekha.ledger import GroupBy

__all__ = [
    "costs",
    "health",
    "metrics",
    "models",
    "openai_models",
    "providers_health",
    "route",
    "search",
    "tasks",
    "to_health",
]


async def say(x: Exchange, said: object, status: int = 200) -> None:
    await x.answer(
        status, orjson.dumps(said, option=orjson.OPT_SERIALIZE_NUMPY), [(b"content-type", b"application/json")]
    )


async def openai_models(serving: Serving, x: Exchange) -> None:
    """`GET /v1/models`, in OpenAI's shape."""
    serving.keys.owner(x.authorization)
    seen: dict[str, Model] = {}
    for model in serving.resources.registry:
        seen.setdefault(model.id, model)
        seen.setdefault(model.name, model)
    data = [
        {"id": name, "object": "model", "created": 0, "owned_by": model.provider_id, "sekha": _model(model)}
        for name, model in seen.items()
    ]
    await say(x, {"object": "list", "data": data})


async def models(serving: Serving, x: Exchange) -> None:
    serving.keys.owner(x.authorization)
    await say(
        x, {"models": [_model(model) | {"task": task} for model in serving.resources.registry for task in model.tasks]}
    )


async def tasks(serving: Serving, x: Exchange) -> None:
    serving.keys.owner(x.authorization)
    await say(x, {"tasks": list(TASKS)})


async def metrics(serving: Serving, x: Exchange) -> None:
    text = "\n".join(serving.metrics.text()) + "\n"
    await x.answer(200, text.encode(), [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")])


async def health(serving: Serving, x: Exchange) -> None:
    await say(x, {"status": "healthy"})


async def providers_health(serving: Serving, x: Exchange) -> None:
    await say(x, {"providers": []})


async def to_health(serving: Serving, x: Exchange) -> None:  # noqa: ARG001 - every page is given it
    await x.answer(307, b"", [(b"location", b"/api/v1/health")])


async def route(serving: Serving, x: Exchange) -> None:
    raise InvalidRequest("not there yet")


async def search(serving: Serving, x: Exchange) -> None:
    raise InvalidRequest("not there yet")


async def costs(serving: Serving, x: Exchange) -> None:
    """`GET /api/v1/costs?by=provider`: what was spent, by group."""
    serving.keys.owner(x.authorization)
    given = parse_qs(x.query.decode())
    by: Any = given.get("by", ["provider"])[-1]
    wanted: GroupBy = by
    ledger = await serving.resources.ledger()
    report = await ledger.report(wanted)
    await say(
        x,
        {
            "by": by,
            "costs": [
                {"group": line.group, "calls": line.calls, "cost": float(line.cost), "estimated": float(line.estimated)}
                for line in report
            ],
        },
    )


def _model(model: Model) -> dict[str, object]:
    return {
        "model_id": model.id,
        "provider_id": model.provider_id,
        "context_window": model.context_window,
        "dimension": model.dimension,
        "supports_vision": model.vision,
        "supports_audio": model.audio,
    }
