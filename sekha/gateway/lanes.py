"""What ordinary chats of one caller with one model have in common, worked out once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

from sekha.asks import Ask, Count, Size
from sekha.errors import RequestRefused
from sekha.field import Entrant
from sekha.gateway.chats import ESTIMATED_COST, stream_headers
from sekha.gateway.http_server import lines_of
from sekha.gateway.serving import Serving
from sekha.keys import Pass
from sekha.ledger import Budget
from sekha.ledgers.encoding import picos
from sekha.pricing import ChatUnits, Price
from sekha.providers.base import Provider
from sekha.providers.relay import RelayProvider
from sekha.registry import Model
from sekha.routing import Plan, plan
from sekha.steps.money import HOLD_SECONDS, Known
from sekha.steps.parts import texts_per_call
from sekha.tokens import TokenizerName, count_each

__all__ = ["Fork", "Junction", "Lane", "lane_of"]

_LOOKED_AT = 100
"""Of a thousand that may serve, none of these over OpenAI's API is enough to know."""
_PICO_PLACES = 12
_PLENTY = 1 << 62


class Lane:
    """What all ordinary chats of one caller with one model have in common."""

    def __init__(self, serving: Serving, ask: Ask, by: Pass, entrant: Entrant, budgets: Sequence[Budget]) -> None:
        resources = serving.resources
        self.ask = ask
        self.by = by
        self.model = model = entrant.model
        self.name = entrant.name
        self.reason = (entrant.why_cheap if resources.rules.cost_aware else entrant.why)[0]
        self.provider = cast("RelayProvider", resources.provider(model.provider_id))
        self.scope = ask.scope(model)
        self.budgets = tuple(budgets)
        self.tokenizer, exact = serving.runtime.money.tokenizer_of(model)
        price = cast("Price", model.price)
        self.exact = exact or price.is_free
        self.tariff = price.tariff
        self.tiers = tuple(name for name, _ in price.tiers)
        """Service tiers in which an answer costs something else, and so is the line's."""
        self.picos = 10 ** (_PICO_PLACES - price.tariff.places)
        """In one unit of the tariff."""
        most = resources.rules.max_cost_per_request
        self.cap = None if most is None else int(most * price.tariff.per_dollar)
        # Whether a limit is sent depends on there being money to keep, and not on how much.
        self.limited = _PLENTY if self.cap is None and self.budgets else self.cap
        self.window = model.context_window
        self.timeout_seconds = resources.registry.provider_of(model).timeout_seconds
        self.hold_seconds = max(HOLD_SECONDS, 4 * self.timeout_seconds)
        self.texts = texts_per_call(resources.registry.provider_of(model).kind)
        """That one call may embed."""
        self.usual = serving.runtime.money.usual
        self.counts = serving.metrics.counts_of(model.provider_id, model.id)
        self.said = {"provider_id": model.provider_id, "model_id": model.id}
        """What every reply says of who answered."""
        named = [(b"x-sekha-provider", model.provider_id.encode()), (b"x-sekha-model", model.id.encode())]
        self.lines = lines_of([(b"content-type", b"application/json"), *named]) + b"x-sekha-cost: "
        """Of a whole answer's head, up to its cost."""
        self.stream_lines = lines_of(stream_headers(model)) + ESTIMATED_COST + b": "
        """The same of a stream's, up to what it is estimated to cost."""
        self.tags = (f"provider:{model.provider_id}", f"model:{model.id}", f"task:{self.scope.task}")


class Junction:
    """Where requests that several models may serve take one lane or another: `plan` says which, of each."""

    def __init__(self, serving: Serving, ask: Ask, by: Pass, known: Known) -> None:
        self.ask = ask
        self.by = by
        self._serving = serving
        self._known = known
        self._tokenizers = serving.runtime.money.tokenizers_of(known.counters)
        self._entrants = {entrant.name: entrant for entrant in known.lined_up.entrants}
        registry = serving.resources.registry
        self.texts = min(texts_per_call(registry.provider_of(each.model).kind) for each in known.lined_up.entrants)
        """That one call may embed, whoever of them takes it over."""
        self._lanes: dict[str, Lane | None] = {}
        self._budgets: dict[str, tuple[Budget, ...]] = {}

    def count(self, count: Callable[[TokenizerName], int | None]) -> dict[str, Count] | None:
        """What each counter of these models makes of a chat; None where one cannot."""
        counts: dict[str, Count] = {}
        for name, tokenizer in self._tokenizers.items():
            if (tokens := count(tokenizer)) is None:
                return None
            counts[name] = Count(tokens)
        return counts

    def count_texts(self, texts: Sequence[str]) -> dict[str, Count]:
        """The same of texts to embed."""
        each = {name: count_each(texts, tokenizer) for name, tokenizer in self._tokenizers.items()}
        return {name: Count(sum(counts), max(counts)) for name, counts in each.items()}

    def fork(self, size: Size, counts: Mapping[str, Count]) -> Fork | None:
        """Choose as the line would; None for what it has to refuse or to wait for, or whose first model has no lane."""
        resources = self._serving.resources
        estimates = self._serving.runtime.money.estimates(size, counts)
        try:
            chosen = plan(estimates, resources.registry, resources.conditions(estimates))
        except RequestRefused:
            return None
        lane = self.lane(chosen.first.model)
        return None if lane is None else Fork(self, lane, chosen)

    def lane(self, model: Model) -> Lane | None:
        """The lane to a model; None where there is none."""
        name = model.name
        if name not in self._lanes:
            entrant = self._entrants.get(name)
            found = entrant is not None and _lane(self._serving, self.ask, self.by, entrant, self.covering(model))
            self._lanes[name] = found or None
        return self._lanes[name]

    def patience_seconds(self, chosen: Plan) -> float:
        return self._serving.resources.patience_seconds(chosen)

    def covering(self, model: Model) -> tuple[Budget, ...]:
        """The budgets that a call to the model counts against."""
        found = self._budgets.get(model.name)
        if found is None:
            scope = self.ask.scope(model)
            found = tuple(budget for budget in self._known.budgets if budget.covers(scope))
            self._budgets[model.name] = found
        return found


class Fork(NamedTuple):
    """The lane that one request takes at a junction, and who stands behind."""

    junction: Junction
    lane: Lane
    plan: Plan

    @property
    def units(self) -> ChatUnits:
        """What the plan says of the first call: it is sent as it is held, and the hold may be cut to a budget."""
        expected, worst, _, length, _, limit, basis = self.plan.first.estimate
        per_dollar = self.lane.tariff.per_dollar
        return ChatUnits(int(expected * per_dollar), int(worst * per_dollar), length, limit, basis)

    @property
    def amounts(self) -> tuple[tuple[Budget, ...], tuple[int, ...]]:
        """The budgets that the calls may count against, with the dearest of those that count against each."""
        lane, (first, *others) = self.lane, self.plan.candidates
        worst = picos(first.estimate.worst_case)
        if not lane.budgets and not others:
            return (), ()
        most = {budget.name: (budget, worst) for budget in lane.budgets}
        for model, estimate, _ in others:
            worst = picos(estimate.worst_case)
            for budget in self.junction.covering(model):
                known = most.get(budget.name)
                if known is None or worst > known[1]:
                    most[budget.name] = budget, worst
        return tuple([budget for budget, _ in most.values()]), tuple([worst for _, worst in most.values()])

    @property
    def hold_seconds(self) -> float:
        return max(HOLD_SECONDS, 2 * self.junction.patience_seconds(self.plan))


def lane_of(serving: Serving, ask: Ask, by: Pass, known: Known) -> Lane | Junction | None:
    """The short way of asks like this one; None where there is none: nobody may serve it, or not over OpenAI's API."""
    entrants = known.lined_up.entrants
    if len(entrants) == 1:
        return _lane(serving, ask, by, entrants[0], known.budgets)
    able = any(isinstance(_provider(serving, each.model), RelayProvider) for each in entrants[:_LOOKED_AT])
    return Junction(serving, ask, by, known) if able else None


def _lane(serving: Serving, ask: Ask, by: Pass, entrant: Entrant, budgets: Sequence[Budget]) -> Lane | None:
    price = entrant.model.price
    if not isinstance(_provider(serving, entrant.model), RelayProvider) or price is None or price.long_input:
        return None
    return Lane(serving, ask, by, entrant, budgets) if price.tariff.places <= _PICO_PLACES else None


def _provider(serving: Serving, model: Model) -> Provider:
    return serving.resources.provider(model.provider_id)
