"""Automations that a user can switch on: Prefect keeps them, and acts on what gateways tell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prefect.client.orchestration import PrefectClient, get_client
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound

from blocks.answering import prefect_answers
from sekha import yaml_file
from sekha.errors import ConfigMissing, Problem

__all__ = ["Registered", "register_automations"]


@dataclass(frozen=True, slots=True)
class Registered:
    """What became of one automation."""

    name: str
    outcome: Literal["created", "updated", "unchanged"]
    enabled: bool


async def register_automations(declared: str, *, notify: str | None = None) -> list[Registered]:
    """Create the automations that YAML declares; those that are there already stay as they were edited.

    `notify` names a notification block, `slack-webhook/ops`: then each of them notifies it, and is on.
    Raises `PrefectUnavailable`, and `ConfigMissing` when there is no such block.
    """
    document = yaml_file.read(declared).data
    with prefect_answers():
        async with get_client() as client:
            changes = await _notifies(client, notify, document["notification"]) if notify else {}
            return [
                await _register(client, AutomationCore.model_validate({**each, **changes}), bool(changes))
                for each in document["automations"]
            ]


async def _register(client: PrefectClient, wanted: AutomationCore, update: bool) -> Registered:
    there = await client.read_automations_by_name(wanted.name)
    if not there:
        await client.create_automation(wanted)
        return Registered(wanted.name, "created", wanted.enabled)
    first = there[0]
    if not update or (first.actions == wanted.actions and first.enabled):
        return Registered(wanted.name, "unchanged", first.enabled)
    edited = {"description": first.description, "tags": first.tags, "trigger": first.trigger}
    await client.update_automation(first.id, wanted.model_copy(update=edited))
    return Registered(wanted.name, "updated", wanted.enabled)


async def _notifies(client: PrefectClient, block: str, notification: Mapping[str, Any]) -> dict[str, Any]:
    kind, _, name = block.partition("/")
    try:
        document = await client.read_block_document_by_name(name, kind)
    except ObjectNotFound as error:
        message = "there is no such block. Name a notification block of Prefect by type and name: slack-webhook/ops."
        raise ConfigMissing(f"Prefect block {block!r}", [Problem("", message)]) from error
    action = {"type": "send-notification", "block_document_id": str(document.id), **notification}
    return {"actions": [action], "enabled": True}
