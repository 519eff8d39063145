"""`sekha costs`: what was spent, whoever spent it."""

from __future__ import annotations

from sekha.testing import StandIn
from tests.fixtures.gateway import config_for
from tests.fixtures.process import Serves
from tests.sekha.cli.conftest import Command


async def test_what_the_gateway_spent_is_reported_by_tag_model_and_budget(sekha: Command, serving: Serves) -> None:
    async with StandIn() as standin, serving(config_for(standin)) as gate:
        for team in ("red", "red", "blue"):
            answered = await gate.chat(model="chat", metadata={"team": team})
            assert answered.status_code == 200
        spent = 3 * answered.json()["sekha"]["cost"]
        gate.process.terminate()
        await gate.ended()

        by_tag = await sekha("costs", "--by", "tag", "--json")
        by_model = await sekha("costs", "--json")
        shown = await sekha("costs", "--by", "model")

    calls = {line["group"]: line["calls"] for line in by_tag.json["costs"]}
    assert calls == {"team:red": 2, "team:blue": 1}
    assert by_tag.json["total"] is None
    assert float(by_model.json["total"]["cost"]) == spent
    [budget] = by_model.json["budgets"]
    assert (budget["name"], float(budget["spent"]), float(budget["held"])) == ("all", spent, 0)
    assert "in all" not in shown.out
    assert "$1000.00 (month)" in shown.out


async def test_nothing_on_record_is_said_and_no_table_drawn(sekha: Command) -> None:
    ended = await sekha("costs", "--since", "24h")

    assert ended.code == 0
    assert ended.out == ""
    assert "Nothing is on record there" in ended.err


async def test_a_time_that_is_none_is_refused_with_what_to_write(sekha: Command) -> None:
    ended = await sekha("costs", "--since", "yesterday")

    assert ended.code == 2
    assert "24h, 7d, 2w or 2026-11-01" in ended.err
