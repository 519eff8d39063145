from __future__ import annotations

import base64

import pytest

from sekha.breaker import BreakerRules
from sekha.circuits import Circuits
from sekha.circuits_shared import SharedCircuits
from sekha.errors import ProviderUnavailable
from sekha.ledgers import open_database
from sekha.testing import StandIn

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


def two_providers(first: StandIn, second: StandIn) -> str:
    return f"""
providers:
  - id: first
    provider_type: openai
    base_url: {first.openai_url}
    api_key: ${{OPENAI_API_KEY}}
    priority: 1
    models:
      - {{model_id: gpt-4o-mini, task: chat_small, supports_vision: true}}
  - id: second
    provider_type: openai
    base_url: {second.openai_url}
    api_key: ${{OPENAI_API_KEY}}
    priority: 2
    models:
      - {{model_id: gpt-4o-mini, task: chat_small}}
"""


async def test_the_answer_goes_to_stdout_and_its_cost_to_stderr(sekha):
    ended = await sekha("chat", "what is a hold?")

    assert ended.code == 0
    assert ended.out.endswith("You said: what is a hold?\n")
    assert "builtin/echo" in ended.err
    assert "$0" in ended.err


async def test_a_prompt_is_read_from_stdin(sekha):
    ended = await sekha("chat", "-", stdin="schöne Grüße\n".encode())

    assert "schöne Grüße" in ended.out


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (["chat", " "], b"", "empty"),
        (["chat", "-"], b"", "empty"),
        (["chat", "-"], b"\xff\xfe", "not UTF-8"),
        (["chat", "hi", "--model", "ecko"], b"", "Did you mean 'echo'?"),
        (["chat", "hi", "--image", "nope.png"], b"", "nope.png"),
        (["chat", "hi", "--image", "https://example.com/cat.png"], b"", "does not take images"),
        (["route", "hi", "--model", "ecko"], b"", "Did you mean 'echo'?"),
    ],
)
async def test_what_cannot_be_asked_is_refused(sekha, arguments, stdin, says):
    ended = await sekha(*arguments, stdin=stdin)

    assert ended.code == 4
    assert says in ended.err
    assert ended.out == ""


@pytest.mark.parametrize("cost", ["-1", "cheap", "nan"])
async def test_a_cost_that_is_no_amount_is_a_usage_error(sekha, cost):
    ended = await sekha("chat", "hi", f"--max-cost={cost}")

    assert ended.code == 2
    assert "no amount" in ended.err


async def test_a_program_gets_the_whole_reply(sekha):
    reply = (await sekha("chat", "hi", "--json")).json

    assert reply["provider_id"] == "builtin"
    assert reply["cost"] == 0
    assert reply["usage"]["input_tokens"] == 1
    assert reply["body"]["object"] == "chat.completion"


async def test_a_route_shows_who_is_asked_and_who_is_not_and_calls_nobody(sekha, tmp_path):
    async with StandIn() as first, StandIn() as second:
        sekha.write("sekha.yaml", two_providers(first, second))
        (tmp_path / "dot.png").write_bytes(PNG)

        shown = await sekha("route", "what is this?", "--image", "dot.png")
        plan = (await sekha("route", "what is this?", "--image", "dot.png", "--json")).json

        assert first.requests == second.requests == []
    assert "first/gpt-4o-mini" in shown.out
    assert "it does not take images" in shown.out
    assert [candidate["model"] for candidate in plan["candidates"]] == ["first/gpt-4o-mini"]
    (dropped,) = plan["dropped"]
    assert (dropped["model"], dropped["rule"]) == ("second/gpt-4o-mini", "capability")
    assert dropped["why"] == "it does not take images"
    assert dropped["capabilities"]["vision"] is False
    assert 0 < plan["candidates"][0]["estimate"]["expected"] <= plan["worst_case"]


async def test_a_route_of_an_embedding_shows_who_embeds(sekha):
    ended = await sekha("route", "hi", "--task", "embedding", "--json")
    of_chats = await sekha("route", "hi", "--task", "embedding", "--max-tokens", "5")

    assert ended.code == 0
    assert [each["model"] for each in ended.json["candidates"]] == ["builtin/hashed-768"]
    assert of_chats.code != 0
    assert "--max-tokens is for chats" in of_chats.err


async def test_a_route_that_nobody_can_take_shows_every_price_and_is_refused(sekha):
    async with StandIn() as first, StandIn() as second:
        sekha.write("sekha.yaml", two_providers(first, second))

        shown = await sekha("route", "hi", "--max-cost", "0.0000001")
        ended = await sekha("route", "hi", "--max-cost", "0.0000001", "--json")

    assert shown.code == ended.code == 4
    assert shown.out.count("cost") >= 2
    assert "first/gpt-4o-mini" in shown.out
    assert "The cheapest model" in shown.err
    assert ended.json["candidates"] == []
    assert [(each["model"], each["rule"]) for each in ended.json["dropped"]] == [
        ("first/gpt-4o-mini", "cost"),
        ("second/gpt-4o-mini", "cost"),
    ]
    assert all(each["estimate"]["worst_case"] > 0 for each in ended.json["dropped"])
    assert ended.error["code"] == "cost_refused"


async def test_a_route_tells_what_budgets_have_left_and_who_shares_the_traffic(sekha):
    async with StandIn() as first, StandIn() as second:
        same = two_providers(first, second).replace("priority: 2", "priority: 1")
        sekha.write("sekha.yaml", f"{same}budgets:\n  - {{name: team, limit: 5.00, period: day}}\n")

        shown = await sekha("route", "hi")
        plan = (await sekha("route", "hi", "--json")).json

    assert "one of 2 equals" in shown.out
    assert "Left in budgets: team $5.00" in shown.out
    assert [each["equals"] for each in plan["candidates"]] == [2, 2]
    assert plan["candidates"][0]["budgets"] == {"team": 5.0}
    assert plan["candidates"][0]["circuit"] == "closed"


async def test_a_reply_that_may_cost_too_much_is_refused_with_the_cheapest(sekha):
    async with StandIn() as first, StandIn() as second:
        sekha.write("sekha.yaml", two_providers(first, second))

        ended = await sekha("chat", "hi", "--max-cost", "0.0000001", "--json")

        assert first.requests == second.requests == []
    assert ended.code == 4
    assert ended.error["code"] == "cost_refused"
    assert ended.error["cheapest"].endswith("/gpt-4o-mini")


async def test_a_fallback_answers_and_the_failure_is_told(sekha):
    async with StandIn() as first, StandIn() as second:
        first.fail(500, times=None)
        sekha.write("sekha.yaml", two_providers(first, second))

        ended = await sekha("chat", "hi")

    assert ended.code == 0
    assert "first/gpt-4o-mini failed: provider_unavailable" in ended.err
    assert "second/gpt-4o-mini ·" in ended.err


async def test_a_provider_that_refuses_our_key_ends_the_command_and_hides_the_key(sekha):
    async with StandIn() as first, StandIn() as second:
        first.fail(401, times=None)
        second.fail(401, times=None)
        sekha.write("sekha.yaml", two_providers(first, second))

        ended = await sekha("chat", "hi")

    assert ended.code == 5
    assert "refuses our key" in ended.err
    assert ended.out == ""


async def test_a_flow_run_without_a_server_says_how_to_start_one(sekha):
    ended = await sekha("chat", "hi", "--flow", environment={"PREFECT_HOME": str(sekha.folder / "prefect")})

    assert ended.code == 7
    assert "sekha up" in ended.err


async def test_a_flow_run_on_a_server_that_is_gone_says_so(sekha):
    ended = await sekha(
        "blocks",
        "push",
        environment={"PREFECT_HOME": str(sekha.folder / "prefect"), "PREFECT_API_URL": "http://127.0.0.1:9/api"},
    )

    assert ended.code == 7
    assert "http://127.0.0.1:9/api" in ended.err


async def test_a_route_knows_the_circuits_that_a_gateway_on_this_ledger_opened(sekha):
    async with StandIn() as first, StandIn() as second:
        sekha.write("sekha.yaml", two_providers(first, second))
        before = await sekha("route", "hi", "--json")
        await opened_circuit("first/gpt-4o-mini", f"sqlite:///{sekha.folder}/.sekha/ledger.db")
        after = await sekha("route", "hi", "--json")

    assert [each["model"] for each in before.json["candidates"]] == ["first/gpt-4o-mini", "second/gpt-4o-mini"]
    assert [each["model"] for each in after.json["candidates"]] == ["second/gpt-4o-mini"]
    [dropped] = after.json["dropped"]
    assert (dropped["model"], dropped["rule"], dropped["circuit"]) == ("first/gpt-4o-mini", "circuit", "open")


async def opened_circuit(name: str, ledger: str) -> None:
    """Have a model fail at a gateway until its circuit opens, and tell the others."""
    database = open_database(ledger)
    circuits = Circuits(BreakerRules(failure_threshold=1), shared=SharedCircuits(database))
    await circuits.start()
    circuits.note(name, ProviderUnavailable(provider_id=name.partition("/")[0]))
    await circuits.aclose()
    database.close()
