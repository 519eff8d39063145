"""What it takes to decide who is asked, with all features on: pure computing, in this process.

    python benchmarks/routing.py

Two figures are bounded. A thousand models, 100 providers × 10, decide in 50 µs, however their prices, priorities and
budgets lie. And a request as most are, a short prompt and three models, spends 35 µs in the two steps before money is
held: counting and pricing it, and choosing. Beside them stands the plain plan that looks at every model in turn, which
is what explains a choice. Exits with 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Callable
from decimal import Decimal
from itertools import cycle
from pathlib import Path
from statistics import median_low
from time import perf_counter
from timeit import Timer

from sekha.chat import ChatRequest
from sekha.ledger import Budget
from sekha.loading import load
from sekha.pricing import Price
from sekha.rates import ProviderRates, RateLimit
from sekha.registry import Limits, Model, ProviderSpec, Registry
from sekha.resources import Resources
from sekha.routing import Ask, Conditions, Count, Counter, Estimates, Rules, Size, explain, plan
from sekha.steps.money import Money

BATCH = 20
BOUND_MANY_US = 50.0
BOUND_HOT_US = 35.0
PROMPT = "What does a hold do, and why is what is left of it freed when every candidate fails one after another?"

# The echo model answers without a key, and the prices are the file's, so that every step is the real one.
CONFIGURATION = """
providers:
  - id: one
    provider_type: openai
    base_url: http://127.0.0.1:9/v1
    models:
      - {model_id: gpt-4o-mini, task: chat_small, price: {input_per_million: 0.15, output_per_million: 0.60}}
      - {model_id: gpt-4o, task: chat_small, price: {input_per_million: 2.50, output_per_million: 10.00}}
  - id: two
    provider_type: openai
    base_url: http://127.0.0.1:9/v1
    models:
      - {model_id: gpt-4o-mini, task: chat_small, price: {input_per_million: 0.15, output_per_million: 0.60}}
routing: {max_cost_per_request: 1.00}
"""


def thousand(*, priorities: int, prices: int) -> Registry:
    chance = random.Random(7)
    of = [
        Price(
            input=Decimal(chance.randrange(5, 3000)) / 100,
            output=Decimal(chance.randrange(5, 9000)) / 100,
            source="price map",
        )
        for _ in range(prices)
    ]
    providers = {}
    for number in range(100):
        name = f"provider-{number}"
        models = tuple(
            Model(
                id=f"model-{each}",
                provider_id=name,
                tasks=("chat_small",),
                context_window=128_000,
                max_output_tokens=16_384,
                weight=chance.randrange(1, 4),
                price=of[chance.randrange(prices)],
            )
            for each in range(10)
        )
        providers[name] = ProviderSpec(
            id=name, kind="openai", priority=1 + number % priorities, models=models, limits=Limits(10_000, 10_000_000)
        )
    return Registry(providers=providers)


def asked(registry: Registry, *, ask: Ask, budgets: tuple[Budget, ...] = (), left: str = "1000") -> Estimates:
    usual = {model.name: 200 + 7 * at % 300 for at, model in enumerate(registry) if at % 2}
    return Estimates(
        size=Size(ask),
        counters={model.id: Counter(("o200k_base", "cl100k_base")[len(model.id) % 2], False) for model in registry},
        counts={"o200k_base": Count(31), "cl100k_base": Count(33)},
        usual=usual,
        compared_at=median_low(usual.values()),
        rules=Rules(max_cost_per_request=Decimal("0.05")),
        budgets=budgets,
        remaining={budget.name: Decimal(left) for budget in budgets},
    )


def conditions(registry: Registry, limits: ProviderRates) -> Callable[[], Conditions]:
    """As a gateway has them: some circuits open, two providers at their limits, every latency known."""
    shut = frozenset(model.name for at, model in enumerate(registry) if at % 100 == 3)
    latency = {model.name: 0.2 + at % 17 / 10 for at, model in enumerate(registry)}
    for name in ("provider-5", "provider-6"):
        for _ in range(10_000):
            limits.take(name, 1)

    def now() -> Conditions:
        return Conditions(shut, limits.throttled(300), latency, random.random())

    return now


def cases() -> dict[str, tuple[Registry, Estimates]]:
    chat = Ask(kind="chat", key="research", tags=frozenset({"eval"}))
    budgets = (
        Budget(name="all", limit=Decimal(1000)),
        Budget(name="research", limit=Decimal(1000), match={"key": "research"}),
        Budget(name="one", limit=Decimal(1000), match={"provider": "provider-1"}),
    )
    varied, alike, graded = (
        thousand(priorities=1, prices=1000),
        thousand(priorities=1, prices=1),
        thousand(priorities=100, prices=50),
    )
    return {
        "all prices different": (varied, asked(varied, ask=chat, budgets=budgets)),
        "all equal": (alike, asked(alike, ask=chat, budgets=budgets)),
        "100 priorities": (graded, asked(graded, ask=chat, budgets=budgets)),
        "budgets nearly spent": (varied, asked(varied, ask=chat, budgets=budgets, left="0.0005")),
        "a model at 100 providers": (varied, asked(varied, ask=Ask(kind="chat", model="model-3"), budgets=budgets)),
    }


def microseconds(work: Callable[[], object], *, runs: int) -> float:
    """The quickest of many short batches: what others do on the machine only ever adds to it."""
    work()
    return min(Timer(work).repeat(runs // BATCH, BATCH)) / BATCH * 1e6


def others_shut(registry: Registry, estimates: Estimates, held: Conditions, *, runs: int) -> float:
    """What a choice takes where it is others that are at their limits each time, and nothing remembered helps."""
    pairs = [{f"provider-{number}": 3.0, "provider-99": 3.0} for number in range(99)]
    turns = cycle([held._replace(throttled=throttled) for throttled in pairs])
    return microseconds(lambda: plan(estimates, registry, next(turns)._replace(draw=random.random())), runs=runs)


def many(runs: int) -> tuple[dict[str, float], dict[str, float], float, float]:
    """Of each case what a choice takes and what explaining it does; what it takes where others are shut each time,
    which no bound is for; and what it takes to see who is."""
    quick: dict[str, float] = {}
    plain: dict[str, float] = {}
    looking = changing = 0.0
    for name, (registry, estimates) in cases().items():
        now = conditions(registry, ProviderRates(registry, clock=perf_counter))

        held = now()
        assert [each.model for each in plan(estimates, registry, held).candidates] == [
            each.model for each in explain(estimates, registry, held).kept
        ]

        def decide(estimates: Estimates = estimates, registry: Registry = registry, held: Conditions = held) -> object:
            return plan(estimates, registry, Conditions(*held[:3], random.random()))

        quick[name] = microseconds(decide, runs=runs)
        if name == "all equal":
            changing = others_shut(registry, estimates, held, runs=runs // 10)
        began = perf_counter()
        explain(estimates, registry, held)
        plain[name] = (perf_counter() - began) * 1e6
        looking = microseconds(now, runs=runs)
    return quick, plain, changing, looking


async def hot(runs: int) -> dict[str, float]:
    """The two steps of a request, as they run in a gateway but for the ledger, which is another benchmark."""
    messages = ({"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": PROMPT})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sekha.yaml"
        file.write_text(CONFIGURATION, "utf-8")
        resources = Resources(load(file))
        money = Money(resources)
        taken: dict[str, list[float]] = {"estimate": [], "select": [], "both": []}
        for turn in range(runs // BATCH + 1):
            estimating = selecting = 0.0
            for _ in range(BATCH):
                request = ChatRequest(messages=messages, task="chat_small")
                began = perf_counter()
                estimates = await money.estimate_cost(request)
                between = perf_counter()
                await money.select_provider(request, estimates)
                ended = perf_counter()
                estimating += between - began
                selecting += ended - between
            if turn:
                taken["estimate"].append(estimating / BATCH * 1e6)
                taken["select"].append(selecting / BATCH * 1e6)
                taken["both"].append((estimating + selecting) / BATCH * 1e6)
        await money.aclose()
        await resources.aclose()
    return {name: min(each) for name, each in taken.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000, help="decisions of each sort, in batches of 20")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args()

    quick, plain, changing, looking = many(options.runs)
    request = asyncio.run(hot(options.runs))
    limit = RateLimit(clock=perf_counter, requests_per_minute=10**9, tokens_per_minute=10**12)
    counting = microseconds(lambda: (limit.wait(300), limit.take(300)), runs=options.runs)
    missed = max(quick.values()) > BOUND_MANY_US or request["both"] > BOUND_HOT_US
    if options.json:
        print(
            json.dumps(
                {
                    "1000 models": quick,
                    "explained": plain,
                    "request": request,
                    "rate limit": counting,
                    "others shut each time": changing,
                    "throttled": looking,
                }
            )
        )
        return int(missed)
    print("1,000 models, of which five are chosen, µs")
    for name, took in quick.items():
        verdict = "  MISSED" if took > BOUND_MANY_US else ""
        print(f"  {name:28} {took:8.1f}  <= {BOUND_MANY_US:.0f}{verdict}    one by one {plain[name]:10,.0f}")
    print(f"  {'all equal, others shut':28} {changing:8.1f}  each time other providers at their limits")
    print(f"  {'who is throttled, 2 of 100':28} {looking:8.1f}")
    print("a short prompt, three models, µs")
    print(f"  {'count and price':28} {request['estimate']:8.1f}")
    print(f"  {'choose':28} {request['select']:8.1f}")
    verdict = "  MISSED" if request["both"] > BOUND_HOT_US else ""
    print(f"  {'both':28} {request['both']:8.1f}  <= {BOUND_HOT_US:.0f}{verdict}")
    print(f"ask and count a rate limit, µs  {counting:7.1f}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
