"""`POST /api/v1/route`: who would answer, at what price, and why nobody else. Calls nobody."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import orjson

from sekha.asks import Estimates
from sekha.chat import ChatRequest
from sekha.embedding import EmbedRequest
from sekha.errors import InvalidRequest, NoCandidate, RequestRefused
from sekha.gateway.exchange import Exchange
from sekha.gateway.fields import dollars, flag, kind_of, object_in, text, whole
from sekha.gateway.pages import say
from sekha.gateway.problems import answer_to, problem
from sekha.gateway.serving import BODY_MB, BODY_SECONDS, Serving
from sekha.gateway.wire import tags_of
from sekha.registry import TASKS, Registry, Task
from sekha.routing import Explanation, Verdict

__all__ = ["route"]

_OURS = frozenset(
    {"task", "model", "preferred_model", "require_vision", "max_cost", "context_size", "messages", "input"}
    | {"metadata", "stream", "store"}
)
_MOST_TOKENS = 100_000_000
_NOTHING_SAID: tuple[Mapping[str, Any], ...] = ({"role": "user", "content": ""},)


async def route(serving: Serving, x: Exchange) -> None:
    """Explain the choice for a request, or for one of a size that is told."""
    key = serving.keys.owner(x.authorization)
    given = object_in(await x.body(limit_mb=BODY_MB, timeout_seconds=BODY_SECONDS))
    context_size = whole(given, "context_size", 1, _MOST_TOKENS)
    request = _asked(given, key.name if key else None)
    money = serving.runtime.money
    estimates = await money.estimate_cost(request)
    explained = money.explain_choice(_as_large_as(context_size, estimates))
    registry = serving.resources.registry
    candidates = [_candidate(each, registry) for each in explained.verdicts]
    if not explained.kept:
        return await _refuse(x, explained, candidates)
    first = explained.kept[0]
    return await say(
        x,
        {
            "provider_id": first.model.provider_id,
            "provider_type": registry.provider_of(first.model).kind,
            "model_id": first.model.id,
            "estimated_cost": float(first.estimate.expected) if first.estimate else None,
            "worst_case_cost": float(first.estimate.worst_case) if first.estimate else None,
            "reason": first.why,
            "candidates": candidates,
        },
    )


def _asked(given: Mapping[str, Any], key: str | None) -> ChatRequest | EmbedRequest:
    task = text(given, "task")
    if task is not None and not _is_task(task):
        raise InvalidRequest(f"There is no task {task[:64]!r}. Tasks are {', '.join(TASKS)}.", field="task")
    model, preferred = text(given, "model"), text(given, "preferred_model")
    require_vision = flag(given, "require_vision", default=False)
    tags = tags_of(given.get("metadata"))
    if task == "embedding":
        return EmbedRequest(
            texts=_texts(given.get("input")),
            model=model or preferred,
            max_cost=dollars(given, "max_cost"),
            tags=tags,
            key=key,
        )
    messages = given.get("messages")
    if messages is not None and not isinstance(messages, list):
        raise InvalidRequest(f"`messages` must be a list, not {kind_of(messages)}.", field="messages")
    return ChatRequest(
        messages=_NOTHING_SAID if messages is None else tuple(messages),
        model=model,
        task=task,
        preferred_model=preferred,
        require_vision=require_vision,
        max_cost=dollars(given, "max_cost"),
        options={name: value for name, value in given.items() if name not in _OURS},
        tags=tags,
        key=key,
    )


def _is_task(task: str) -> TypeGuard[Task]:
    return task in TASKS


def _texts(given: object) -> tuple[str, ...]:
    match given:
        case None:
            # The shortest there is: what it costs is told by `context_size`.
            return ("a",)
        case str():
            return (given,)
        case list() if given and all(isinstance(each, str) for each in given):
            return tuple(given)
        case _:
            raise InvalidRequest("`input` must be a text, or a list of texts.", field="input")


def _as_large_as(tokens: int | None, estimates: Estimates) -> Estimates:
    """The same request, with so many tokens going in at the least."""
    if tokens is None:
        return estimates
    counts = {
        counter: count._replace(tokens=max(count.tokens, tokens), longest=max(count.longest, tokens))
        for counter, count in estimates.counts.items()
    }
    return estimates._replace(counts=counts)


async def _refuse(x: Exchange, explained: Explanation, candidates: list[dict[str, object]]) -> None:
    """Say that nobody would be asked: 503 whatever the reason, which `code` and the candidates tell."""
    refusal: RequestRefused = explained.refusal or NoCandidate(str(explained.ask), [])
    _, _, headers = answer_to(refusal)
    await x.answer(503, orjson.dumps(problem(refusal) | {"candidates": candidates}), headers)


def _candidate(verdict: Verdict, registry: Registry) -> dict[str, object]:
    model, estimate = verdict.model, verdict.estimate
    wait = verdict.throttled_seconds
    return {
        "provider_id": model.provider_id,
        "provider_type": registry.provider_of(model).kind,
        "model_id": model.id,
        "place": verdict.place,
        "rule": verdict.rule,
        "reason": verdict.why,
        "price": estimate
        and {
            "estimated_cost": float(estimate.expected),
            "worst_case_cost": float(estimate.worst_case),
            "input_tokens": estimate.input_tokens,
            "output_tokens": estimate.output_tokens,
            "reply_length": estimate.basis,
        },
        "circuit": verdict.circuit,
        "budgets": {name: float(left) for name, left in verdict.budgets.items()},
        "capability": {
            "tasks": list(model.tasks),
            "context_window": model.context_window,
            "vision": model.vision,
            "audio": model.audio,
            "function_calling": model.function_calling,
        },
        "priority": verdict.priority,
        "weight": model.weight,
        # A limit that never lets it pass has no number of seconds.
        "throttled_seconds": None if math.isinf(wait) else wait,
        "latency_seconds": verdict.latency_seconds,
    }
