from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from sekha.config import Config

EXAMPLE = Path(__file__).resolve().parents[3] / "sekha.example.yaml"


async def test_without_a_file_it_says_that_the_builtin_models_are_used(sekha):
    ended = await sekha("check")

    assert ended.code == 0
    assert "no file found, so the built-in models" in ended.out
    assert "Documents_768" in ended.out
    assert "free (local)" in ended.out


async def test_the_example_is_valid_and_shows_no_key(sekha):
    ended = await sekha("-c", str(EXAMPLE), "check")

    assert ended.code == 0
    assert "set (${OPENAI_API_KEY})" in ended.out
    assert "Conversations_1536" in ended.out
    assert "$10.00 out (configured)" in ended.out
    assert "`migrations`: checked, and without effect in this version" in ended.out


async def test_a_program_gets_the_same_picture(sekha):
    picture = (await sekha("check", "--json", "-c", str(EXAMPLE))).json

    openai = next(provider for provider in picture["providers"] if provider["id"] == "openai")
    assert (openai["key_set"], openai["key_from"]) == (True, "${OPENAI_API_KEY}")
    assert picture["collections"][0]["space"] == "Documents_768"
    assert picture["budgets"][0]["limit"] == 100
    assert any("`migrations`" in warning for warning in picture["warnings"])


async def test_everything_wrong_is_said_at_once(sekha):
    sekha.write(
        "sekha.yaml",
        "providers:\n"
        "  - id: a\n"
        "    provider_type: opnai\n"
        "    priorty: 3\n"
        "    models: [{model_id: m, task: embedding}]\n",
    )

    ended = await sekha("check")

    assert ended.code == 3
    assert "line 3" in ended.err
    assert "Did you mean 'openai'?" in ended.err
    assert "Did you mean 'priority'?" in ended.err
    assert "needs `dimension:`" in ended.err
    assert ended.out == ""


async def test_a_program_gets_each_problem_with_its_place(sekha):
    sekha.write("sekha.yaml", "unknown_price: maybe\nlog_levl: info\n")

    ended = await sekha("check", "--json")

    assert ended.code == 3
    assert ended.error["code"] == "config_invalid"
    assert {problem["path"]: problem["line"] for problem in ended.error["problems"]} == {
        "unknown_price": 1,
        "log_levl": 2,
    }


@pytest.mark.parametrize("place", ["before", "behind"])
async def test_a_missing_file_is_named(sekha, place):
    named = ("-c", "nope.yaml")

    ended = await sekha(*(("check", *named) if place == "behind" else (*named, "check")))

    assert ended.code == 3
    assert "nope.yaml" in ended.err


async def test_a_key_or_password_in_the_file_is_never_shown(sekha):
    sekha.write(
        "sekha.yaml",
        "providers:\n"
        "  - id: a\n"
        "    provider_type: openai\n"
        "    base_url: https://me:hunter2@llm.example.com/v1?key=hunter2\n"
        "    api_key: ${HIDDEN}\n"
        "    models: [{model_id: m, task: chat_small, price: free}]\n"
        "ledger: {url: 'postgresql://me:hunter2@db/ledger'}\n",
    )

    for arguments in (["check"], ["check", "--json"], ["models"]):
        ended = await sekha(*arguments, environment={"HIDDEN": "hunter2"})

        assert ended.code == 0, ended.err
        assert "hunter2" not in ended.out + ended.err


async def test_a_price_that_nobody_knows_is_said_to_be_refused(sekha):
    sekha.write(
        "sekha.yaml",
        "providers:\n  - {id: a, provider_type: litellm, models: [{model_id: who/knows, task: chat_small}]}\n",
    )

    ended = await sekha("check")

    assert "unknown: refused" in ended.out


async def test_the_schema_accepts_the_example_and_rejects_a_typo(sekha):
    schema = (await sekha("check", "--schema")).json
    example = yaml.safe_load(EXAMPLE.read_text("utf-8"))

    jsonschema.validate(example, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**example, "budgts": []}, schema)


def test_the_example_shows_every_section_and_finds_its_schema():
    text = EXAMPLE.read_text("utf-8")

    assert text.splitlines()[0] == "# yaml-language-server: $schema=docs/sekha.schema.json"
    assert (EXAMPLE.parent / "docs" / "sekha.schema.json").exists()
    assert set(yaml.safe_load(text)) == set(Config.model_fields)


async def test_models_are_listed_by_task(sekha):
    listed = (await sekha("models", "--task", "embedding", "--json")).json["models"]

    assert [model["model_id"] for model in listed] == ["hashed-768", "hashed-1536", "hashed-3072"]
