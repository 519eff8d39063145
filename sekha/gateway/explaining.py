"""`POST /api/v1/route`: who would answer, at what price, and why nobody else. Calls nobody."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import orjson

from sekha.asks import Estimates
from sekha.chat import ChatRequest
from sekha.embedding import EmbedRequest
from sekha.errors import InvalidRequest, NoCandidate
from sekha.gateway.exchange import Exchange
from sekha.gateway.fields import flag, name_in, object_in, whole
from sekha.gateway.pages import say
from sekha.gateway.problems import answer_to, problem
from sekha.gateway.serving import BODY_MB, BODY_SECONDS, Serving
from sekha.gateway.wire import chat_request, embed_request
from sekha.keys import EVERYBODY, Pass
from sekha.registry import TASKS, Registry
from sekha.routing import Explanation, Verdict

__all__ = ["route"]

_MOST_TOKENS = 100_000_000
# What is priced where nothing was said: the shortest that there is. How much more it is, `context_size` tells.
_CHAT: Mapping[str, Any] = {"messages": [{"role": "user", "content": ""}]}
_TEXT: Mapping[str, Any] = {"input": "a"}


async def route(serving: Serving, x: Exchange) -> None:
    """Explain the choice for a request, or for one of a size that is told."""
    key = serving.keys.owner(x.authorization)
    given = object_in(await x.body(limit_mb=BODY_MB, timeout_seconds=BODY_SECONDS))
    context_size = whole(given, "context_size", 1, _MOST_TOKENS)
    request = _asked(given, EVERYBODY if key is None else Pass(key.name, key.allowed))
    money = serving.runtime.money
    estimates = await money.estimate_cost(request)
    explained = await money.explain_choice(request, estimates, resized=partial(_as_large_as, context_size))
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


def _asked(given: Mapping[str, Any], by: Pass) -> ChatRequest | EmbedRequest:
    """The chat or the embedding that is asked about. Either's own body is taken, or refused, as it would be."""
    task = name_in(given, "task")
    if task is not None and task not in TASKS:
        raise InvalidRequest(f"There is no task {task[:64]!r}. Tasks are {', '.join(TASKS)}.", field="task")
    said = {name: value for name, value in given.items() if value is not None and name != "context_size"}
    request: ChatRequest | EmbedRequest
    if "messages" not in said and ("input" in said or task == "embedding"):
        preferred = name_in(given, "preferred_model")
        request = embed_request({**_TEXT, "model": preferred, **said}, by=by)
    else:
        request = chat_request({**_CHAT, **said}, by=by)
        flag(said, "stream", default=False)
    flag(said, "store", default=True)
    return request


def _as_large_as(tokens: int | None, estimates: Estimates) -> Estimates:
    """The same request, with so many tokens going in at the least."""
    if tokens is None:
        return estimates
    counts = {
        counter: count._replace(tokens=max(count.tokens, tokens), longest=max(count.longest, tokens))
        for counter, count in estimates.counts.items()
    }
    return replace(estimates, counts=counts)


async def _refuse(x: Exchange, explained: Explanation, candidates: list[dict[str, object]]) -> None:
    """Say that nobody would be asked: 503 whatever the reason, which `code` and the candidates tell."""
    refusal = explained.refusal or NoCandidate(str(explained.ask), [])
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
            "compared_cost": None if verdict.compared is None else float(verdict.compared),
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
