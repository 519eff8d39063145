"""Who is worth waiting for, where those who were asked cannot do what a request wants."""

from __future__ import annotations

import math

from sekha.calling import FULL, PAUSED, kept_back, seconds_shut
from sekha.errors import CircuitOpen, FieldUnsupported, ProviderError, RateLimited
from sekha.registry import Model
from sekha.resources import Resources
from sekha.routing import Conditions, Plan, put_by

__all__ = ["unless_others_may"]


def unless_others_may(resources: Resources, chosen: Plan, error: FieldUnsupported) -> None:
    """Raise what says to wait for whoever the plan put by, where the protocols of all who were asked lack a field.

    Nothing where nobody else could serve it later either.
    """
    if chosen.estimates is None:
        return
    registry, conditions = resources.registry, resources.conditions(chosen.estimates)
    # One more of the same protocol lacks it too; behind LiteLLM there are many.
    lacking = {registry.provider_of(candidate.model).kind for candidate in chosen.candidates} - {"litellm"}
    others = [
        model
        for model in put_by(chosen, registry, conditions)
        if registry.provider_of(model).kind not in lacking and conditions.throttled.get(model.provider_id) != math.inf
    ]
    if others:
        # In no variable, which its traceback would keep.
        raise min((_to_wait(resources, model, conditions, error) for model in others), key=_seconds) from error


def _to_wait(
    resources: Resources, model: Model, conditions: Conditions, error: FieldUnsupported
) -> CircuitOpen | RateLimited:
    full, paused = conditions.throttled.get(model.provider_id, 0.0), conditions.paused.get(model.name, 0.0)
    limited, shut = max(full, paused), 0
    if resources.circuits is not None and model.name in conditions.open_circuits:
        shut = seconds_shut(model, resources.circuits)
    later: CircuitOpen | RateLimited
    if shut >= limited:
        later = CircuitOpen(provider_id=model.provider_id, model_id=model.id, retry_after_seconds=shut)
    else:
        later = kept_back(model, FULL if full >= paused else PAUSED, limited)
    later.attempts = error.attempts
    return later


def _seconds(error: ProviderError) -> float:
    return error.retry_after_seconds or 0.0
