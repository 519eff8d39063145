"""What an operator asks: models, tasks, costs, health, metrics and what there is to ask."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, TypeGuard, get_args
from urllib.parse import parse_qs

import orjson

from sekha.breaker import CLOSED, Circuit
from sekha.errors import InvalidRequest, did_you_mean
from sekha.gateway.exchange import Exchange
from sekha.gateway.gauges import standing
from sekha.gateway.health import Look, circuit_values, overall, provider_status, sekha_version, worst_of
from sekha.gateway.serving import Serving
from sekha.ledger import GroupBy, since_of
from sekha.registry import CHAT_TASKS, TASKS, Model, ProviderSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sekha.asks import Allowed
    from sekha.gateway.health import Status
    from sekha.ledger import Spent

__all__ = [
    "GROUPS",
    "costs",
    "docs",
    "health",
    "live",
    "metrics",
    "model",
    "models",
    "openai_models",
    "openapi",
    "providers_health",
    "ready",
    "say",
    "tasks",
    "to_health",
]

GROUPS: tuple[GroupBy, ...] = get_args(GroupBy)
_JSON = (b"content-type", b"application/json")
# The page has its style and its few lines of script within it, and may load nothing at all.
_DOCS_POLICY = b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


async def say(x: Exchange, said: object, status: int = 200) -> None:
    await x.answer(status, orjson.dumps(said), [_JSON])


# --- models --------------------------------------------------------------------------------


async def openai_models(serving: Serving, x: Exchange) -> None:
    """`GET /v1/models`, in OpenAI's shape: all that the key may ask for.

    That is each model by its name, and by its provider's and its own, then `auto` and tasks.
    """
    allowed = serving.keys.known(x.authorization).allowed
    seen: dict[str, Model] = {}
    for each in _usable(serving, allowed):
        seen.setdefault(each.id, each)
        seen.setdefault(each.name, each)
    said = [_openai_model(name, each) for name, each in seen.items()]
    await say(x, {"object": "list", "data": said + [_openai_choice(name) for name in _choices(serving, allowed)]})


async def model(serving: Serving, x: Exchange) -> None:
    """`GET /v1/models/{model}`; the names of models hold slashes."""
    by = serving.keys.known(x.authorization)
    name = x.path.removeprefix("/v1/models/")
    registry = serving.resources.registry
    by.check(registry, name, None)
    if name in _choices(serving, by.allowed):
        return await say(x, _openai_choice(name))
    found = next(each for each in registry.named(name) if by.allowed is None or by.allowed.covers(each))
    return await say(x, _openai_model(name, found))


async def models(serving: Serving, x: Exchange) -> None:
    """`GET /api/v1/models`: every model that the key may use, once for each of its tasks."""
    allowed = serving.keys.known(x.authorization).allowed
    found = [_model(each) | {"task": task} for each in _usable(serving, allowed) for task in each.tasks]
    await say(x, {"models": found})


async def tasks(serving: Serving, x: Exchange) -> None:
    serving.keys.owner(x.authorization)
    await say(x, {"tasks": list(TASKS)})


def _usable(serving: Serving, allowed: Allowed | None) -> list[Model]:
    return [each for each in serving.resources.registry if allowed is None or allowed.covers(each)]


def _choices(serving: Serving, allowed: Allowed | None) -> list[str]:
    """What may be asked for in place of a model: `auto`, and tasks that somebody does."""
    usable = _usable(serving, allowed)
    done = {task for each in usable for task in each.tasks if not (allowed and allowed.tasks) or task in allowed.tasks}
    chats = any(task in CHAT_TASKS for task in done)
    return [*(["auto"] if chats else []), *(task for task in TASKS if task in done)]


def _openai_choice(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "sekha"}


def _openai_model(name: str, model: Model) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": model.provider_id, "sekha": _model(model)}


def _model(model: Model) -> dict[str, object]:
    return {
        "model_id": model.id,
        "provider_id": model.provider_id,
        "context_window": model.context_window,
        "dimension": model.dimension,
        "supports_vision": model.vision,
        "supports_audio": model.audio,
        "supports_function_calling": model.function_calling,
    }


# --- costs ---------------------------------------------------------------------------------


async def costs(serving: Serving, x: Exchange) -> None:
    """`GET /api/v1/costs?by=provider&since=2026-11-01`: what was spent, the dearest first, against the estimate."""
    serving.keys.check_operator(x.authorization, "/api/v1/costs")
    by, since = _costs_asked(x.query, serving.resources.now())
    ledger = await serving.resources.ledger()
    report = await ledger.report(by, since=since)
    # A call with two tags is on two lines of that report, and was paid once.
    counted = await ledger.report("provider", since=since) if by == "tag" else report
    await say(
        x,
        {
            "by": by,
            "since": since and since.isoformat(),
            "costs": [{"group": line.group, **_sums([line])} for line in report],
            "total": _sums(counted),
        },
    )


def _sums(lines: Sequence[Spent]) -> dict[str, object]:
    return {
        "calls": sum(line.calls for line in lines),
        "cost": float(sum(line.cost for line in lines)),
        "estimated": float(sum(line.estimated for line in lines)),
        "input_tokens": sum(line.input_tokens for line in lines),
        "output_tokens": sum(line.output_tokens for line in lines),
    }


def _costs_asked(query: bytes, now: datetime) -> tuple[GroupBy, datetime | None]:
    given = parse_qs(query.decode("latin-1"), keep_blank_values=True)
    for name in given:
        if name not in ("by", "since"):
            near = did_you_mean(name, ("by", "since"))
            raise InvalidRequest(f"There is no parameter {name[:64]!r} here.{near}", field=name[:64])
    by = given.get("by", ["provider"])[-1]
    if not _is_group(by):
        raise InvalidRequest(f"Costs are not kept by {by[:64]!r}, but by {', '.join(GROUPS)}.", field="by")
    return by, _time(given["since"][-1], now) if "since" in given else None


def _is_group(by: str) -> TypeGuard[GroupBy]:
    return by in GROUPS


def _time(written: str, now: datetime) -> datetime:
    try:
        # A `+` that nobody escaped arrives as a space.
        return since_of(written.replace(" ", "+"), now)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(
            "`since` must be a day or a time, such as 2026-11-23 or 2026-11-23T12:00:00Z, or 24h, 7d, 2w.",
            field="since",
        ) from error


# --- health --------------------------------------------------------------------------------


async def live(serving: Serving, x: Exchange) -> None:  # noqa: ARG001 - every page is given it
    """`GET /health/live`: the process answers. Nothing is looked at."""
    await say(x, {"status": "alive"})


async def ready(serving: Serving, x: Exchange) -> None:
    """`GET /health/ready`: requests can be admitted. A provider that is down is no reason to send them elsewhere."""
    looked = await serving.health.ledger()
    leased, up = serving.leased, looked.status != "unhealthy"
    if leased is not None:
        # Out of its slices it answers for a while without the shared ledger, and for no longer.
        up = not leased.is_too_far_behind and serving.health.ledger_away_seconds <= leased.behind_seconds
    await say(x, {"status": "ready" if up else "not_ready"}, 200 if up else 503)


async def to_health(serving: Serving, x: Exchange) -> None:  # noqa: ARG001 - every page is given it
    await x.answer(307, b"", [(b"location", b"/api/v1/health")])


async def health(serving: Serving, x: Exchange) -> None:
    """`GET /api/v1/health`: how it is as a whole. Whoever has no key learns the state and the version alone."""
    known = _may_know(serving, x)
    providers, ledger, store = await asyncio.gather(
        serving.health.providers(), serving.health.ledger(), serving.health.store()
    )
    circuits = serving.circuits.snapshot() if serving.circuits is not None else {}
    specs = list(serving.resources.registry.providers.values())
    paused = serving.resources.pauses.now()
    statuses = [_status(spec, providers[spec.id], circuits, paused) for spec in specs]
    recorder = _recorder(serving)
    status = overall(statuses, ledger.status, store.status, "degraded" if recorder["waits_for"] else "healthy")
    said: dict[str, object] = {"status": status, "version": sekha_version()}
    if known:
        said |= {
            "uptime_seconds": round(time.time() - serving.metrics.started_at, 3),
            "totals": {
                "providers": len(specs),
                "healthy": sum(each in ("healthy", "unknown") for each in statuses),
                "models": len(serving.resources.registry.models),
                "requests_under_way": serving.metrics.under_way,
            },
            "store": _looked(store) | {"kind": serving.resources.loaded.config.store.kind},
            "ledger": _looked(ledger),
            "recorder": recorder,
        }
    await say(x, said, 503 if status == "unhealthy" else 200)


async def providers_health(serving: Serving, x: Exchange) -> None:
    """`GET /api/v1/health/providers`: each provider, as a probe of the last ten seconds and its circuits saw it."""
    known = _may_know(serving, x)
    looks = await serving.health.providers()
    circuits = serving.circuits.snapshot() if serving.circuits is not None else {}
    specs = list(serving.resources.registry.providers.values())
    paused = serving.resources.pauses.now()
    statuses = [_status(spec, looks[spec.id], circuits, paused) for spec in specs]
    said: dict[str, object] = {
        "totals": {
            "providers": len(specs),
            "healthy": sum(each in ("healthy", "unknown") for each in statuses),
        }
    }
    if known:
        said["providers"] = [
            _provider(spec, status, looks[spec.id], circuits, paused)
            for spec, status in zip(specs, statuses, strict=True)
        ]
    await say(x, said)


def _may_know(serving: Serving, x: Exchange) -> bool:
    """Whether the caller is told names and reasons. A load balancer has no key, and needs none."""
    if x.authorization is None and serving.keys:
        return False
    return serving.keys.is_operator(x.authorization)


def _status(spec: ProviderSpec, look: Look, circuits: Mapping[str, Circuit], paused: Mapping[str, float]) -> Status:
    shut = [circuits.get(each.name, CLOSED) for each in spec.models]
    return provider_status(look, shut, limited=any(each.name in paused for each in spec.models))


def _provider(
    spec: ProviderSpec,
    status: Status,
    look: Look,
    circuits: Mapping[str, Circuit],
    paused: Mapping[str, float],
) -> dict[str, object]:
    return {
        "provider_id": spec.id,
        "provider_type": spec.kind,
        **_looked(look),
        "status": status,
        "circuit_breaker": circuit_values(worst_of(spec.models, circuits)),
        "circuits": {each.id: circuit_values(circuits[each.name]) for each in spec.models if each.name in circuits},
        "paused_seconds": {each.id: round(paused[each.name], 3) for each in spec.models if each.name in paused},
        "models_count": len(spec.models),
    }


def _looked(look: Look) -> dict[str, object]:
    milliseconds = None if look.seconds is None else round(look.seconds * 1000, 3)
    return {"status": look.status, "latency_ms": milliseconds, "detail": look.detail}


def _recorder(serving: Serving) -> dict[str, object]:
    if serving.recorder is None:
        return {"sink": "off", "waits_for": "", "queued_bytes": 0, "published": 0, "dropped": 0}
    stats = serving.recorder.stats
    return {
        "sink": stats.sink,
        "waits_for": stats.waits_for,
        "queued_bytes": stats.queued_bytes,
        "published": stats.published,
        "dropped": stats.dropped,
    }


# --- metrics and documentation -------------------------------------------------------------


async def metrics(serving: Serving, x: Exchange) -> None:
    """`GET /metrics`, of all worker processes. It names models and dollars, so it needs a key, or an operator's."""
    serving.keys.check_operator(x.authorization, "/metrics")
    lines = [*serving.metrics.text(), *await standing(serving), ""]
    await x.answer(200, "\n".join(lines).encode(), [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")])


async def openapi(serving: Serving, x: Exchange) -> None:  # noqa: ARG001 - every page is given it
    await x.answer(200, _openapi(), [_JSON])


async def docs(serving: Serving, x: Exchange) -> None:  # noqa: ARG001 - every page is given it
    await x.answer(
        200, _docs(), [(b"content-type", b"text/html; charset=utf-8"), (b"content-security-policy", _DOCS_POLICY)]
    )


@cache
def _openapi() -> bytes:
    from sekha.gateway.openapi import document

    return orjson.dumps(document())


@cache
def _docs() -> bytes:
    from sekha.gateway.docs_page import page
    from sekha.gateway.openapi import document

    return page(document()).encode()
