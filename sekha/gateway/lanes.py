"""What ordinary chats of one caller with one model have in common, worked out once."""

from __future__ import annotations

from typing import cast

from sekha.asks import Ask
from sekha.gateway.http_server import lines_of
from sekha.gateway.serving import Serving
from sekha.keys import Pass
from sekha.pricing import Price
from sekha.providers.relay import RelayProvider
from sekha.registry import Model
from sekha.steps.calls import TEXTS_PER_CALL
from sekha.steps.money import HOLD_SECONDS, Known

__all__ = ["Lane", "lane_of"]

_PICO_PLACES = 12
_PLENTY = 1 << 62


class Lane:
    """What all ordinary chats of one caller with one model have in common."""

    def __init__(self, serving: Serving, ask: Ask, by: Pass, known: Known, provider: RelayProvider) -> None:
        resources = serving.resources
        entrant = known.lined_up.entrants[0]
        self.ask = ask
        self.by = by
        self.model = model = entrant.model
        self.name = entrant.name
        self.reason = entrant.why_cheap if resources.rules.cost_aware else entrant.why
        self.provider = provider
        self.scope = ask.scope(model)
        self.budgets = tuple(known.budgets)
        self.tokenizer, exact = serving.runtime.money.tokenizer_of(model)
        price = cast("Price", model.price)
        self.exact = exact or price.is_free
        self.tariff = price.tariff
        self.picos = 10 ** (_PICO_PLACES - price.tariff.places)
        """In one unit of the tariff."""
        most = resources.rules.max_cost_per_request
        self.cap = None if most is None else int(most.scaleb(price.tariff.places))
        # Whether a limit is sent depends on there being money to keep, and not on how much.
        self.limited = _PLENTY if self.cap is None and self.budgets else self.cap
        self.window = model.context_window
        self.timeout_seconds = resources.registry.provider_of(model).timeout_seconds
        self.hold_seconds = max(HOLD_SECONDS, 4 * self.timeout_seconds)
        self.texts = TEXTS_PER_CALL.get(resources.registry.provider_of(model).kind, 0)
        """That one call may embed."""
        self.usual = serving.runtime.money.usual
        self.counts = serving.metrics.counts_of(model.provider_id, model.id)
        self.said = {"provider_id": model.provider_id, "model_id": model.id}
        """What every reply says of who answered."""
        named = [(b"x-sekha-provider", model.provider_id.encode()), (b"x-sekha-model", model.id.encode())]
        self.lines = lines_of([(b"content-type", b"application/json"), *named]) + b"x-sekha-cost: "
        """Of a whole answer's head, up to its cost."""
        tasks = [task for each in _models_of(serving, model) for task in each.tasks[:1]]
        self.tags = (f"provider:{model.provider_id}", f"model:{model.id}", *(f"task:{task}" for task in tasks))


def _models_of(serving: Serving, model: Model) -> list[Model]:
    """Every entry of the file for this model."""
    return [each for each in serving.resources.registry.provider_of(model).models if each.id == model.id]


def lane_of(serving: Serving, ask: Ask, by: Pass, known: Known) -> Lane | None:
    """The short way of asks like this one; None where there is none: several may serve it, or not over OpenAI's API."""
    entrants = known.lined_up.entrants
    if len(entrants) != 1:
        return None
    model = entrants[0].model
    provider, price = serving.resources.provider(model.provider_id), model.price
    if not isinstance(provider, RelayProvider) or price is None or price.long_input:
        return None
    return Lane(serving, ask, by, known, provider) if price.tariff.places <= _PICO_PLACES else None
