"""`sekha route` and `sekha chat`: who would answer at what price, and the answer."""

from __future__ import annotations

import base64
import math
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sekha.cli.dollars import DOLLARS
from sekha.cli.invocation import Invocation, config_option, flow_option, json_option
from sekha.cli.opening import configuration, name_of, open_here, open_looking, run_async
from sekha.cli.server import in_flow
from sekha.cli.terminal import columns, note, printable, say, show_table, waiting, write_json
from sekha.errors import InvalidRequest, dollars
from sekha.registry import TASKS, Task

if TYPE_CHECKING:
    from sekha.chat import ChatRequest, Reply
    from sekha.embedding import EmbedRequest
    from sekha.loading import Loaded
    from sekha.routing import Explanation, Verdict

__all__ = ["chat", "route"]

F = TypeVar("F", bound=Callable[..., Any])


def _request_options(command: F) -> F:
    for option in reversed(
        (
            click.argument("prompt"),
            click.option("--model", "-m", help="A model, provider/model, a task's name, or auto."),
            click.option(
                "--task", "-t", type=click.Choice(TASKS), help="Let Sekha choose among the models for a task."
            ),
            click.option("--max-cost", type=DOLLARS, help="US dollars that it may cost at the most."),
            click.option("--max-tokens", type=click.IntRange(min=1), help="Tokens of the reply at the most."),
            click.option("--system", help="A system message to put before the prompt."),
            click.option(
                "--image", "images", metavar="FILE|URL", multiple=True, help="An image to ask about; may be repeated."
            ),
        )
    ):
        command = option(command)
    return command


@click.command()
@_request_options
@config_option
@json_option
@click.pass_obj
def route(invocation: Invocation, /, **request: Any) -> None:
    """Show who would answer, at what price and why, calling nobody.

    PROMPT is counted and priced at every model that it may mean; `-` reads it from stdin. Candidates
    are asked in this order, each only when those before it failed. Below them stands every other model
    with the rule that left it out. Circuits are those of the gateways that share this ledger. When nobody
    can be asked, it says so as they would. With --task embedding PROMPT is a text to embed.

    \b
    Examples:
      sekha route "Summarise this" --task chat_small
      sekha route --max-cost 0.01 --json - < letter.txt
    """
    loaded = configuration(invocation)
    asked = _embedding(**request) if request["task"] == "embedding" else _request(**request)
    explained = run_async(_explained(loaded, asked))
    if invocation.as_json:
        write_json(_explained_values(explained))
    else:
        _show_explained(explained)
    if explained.refusal is not None:
        raise explained.refusal


@click.command()
@_request_options
@config_option
@json_option
@flow_option
@click.pass_obj
def chat(invocation: Invocation, /, flow: bool, **request: Any) -> None:
    """Answer a prompt. The answer goes to stdout; who gave it and what it cost, to stderr.

    `-` reads the prompt from stdin. When a provider fails, the next candidate is asked.

    \b
    Examples:
      sekha chat "What does a hold do?"
      git diff | sekha chat - --system "Write a commit message." --max-cost 0.02
    """
    loaded = configuration(invocation)
    asked = _request(**request)
    with waiting("asking"):
        reply: Reply = in_flow("chat", asked, name_of(invocation)) if flow else run_async(_answered(loaded, asked))
    if invocation.as_json:
        return write_json(reply)
    say(printable(reply.text) if sys.stdout.isatty() else reply.text)
    return _show_cost(reply)


# --- what is asked -------------------------------------------------------------------------


def _request(
    *,
    prompt: str,
    model: str | None,
    task: Task | None,
    max_cost: Decimal | None,
    max_tokens: int | None,
    system: str | None,
    images: Sequence[str],
) -> ChatRequest:
    from sekha.chat import ChatRequest

    text = _text(prompt)
    content: Any = text
    if images:
        pictures = [{"type": "image_url", "image_url": {"url": _image_url(image)}} for image in images]
        content = [{"type": "text", "text": text}, *pictures]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return ChatRequest(messages=tuple(messages), model=model, task=task, max_cost=max_cost, max_tokens=max_tokens)


def _embedding(
    *, prompt: str, model: str | None, max_cost: Decimal | None, task: Task, **of_chats: Any
) -> EmbedRequest:
    from sekha.embedding import EmbedRequest

    if given := [name for name, value in of_chats.items() if value]:
        option = {"max_tokens": "--max-tokens", "images": "--image"}.get(given[0], f"--{given[0]}")
        raise InvalidRequest(f"{option} is for chats, and the task {task!r} has none: leave it out.", field=given[0])
    return EmbedRequest(texts=(_text(prompt),), model=model, max_cost=max_cost)


def _text(prompt: str) -> str:
    text = _stdin() if prompt == "-" else prompt
    if not text.strip():
        raise InvalidRequest("The prompt is empty: say what to ask.", field="prompt")
    return text


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The prompt on stdin is not UTF-8: byte {error.start} is no character.") from error


def _image_url(image: str) -> str:
    """A URL as it stands, for the provider to fetch; a file as its bytes."""
    from sekha.images import read_image

    if image.startswith(("http://", "https://", "data:")):
        return image
    try:
        data = Path(image).expanduser().read_bytes()
    except OSError as error:
        raise InvalidRequest(f"Image {image!r} cannot be read: {error.strerror}.", field="image") from error
    return f"data:image/{read_image(data, field=image).format};base64,{base64.b64encode(data).decode()}"


async def _explained(loaded: Loaded, request: ChatRequest | EmbedRequest) -> Explanation:
    async with await open_looking(loaded) as sekha:
        return await sekha.explain(request)


async def _answered(loaded: Loaded, request: ChatRequest) -> Reply:
    async with open_here(loaded) as sekha:
        return await sekha.chat(request)


# --- what is shown -------------------------------------------------------------------------


def _show_explained(explained: Explanation) -> None:
    if explained.kept:
        table = columns("", "model", "expected", "at most", "why", right=("expected", "at most"), wrap=("why",))
        for verdict in explained.kept:
            shared = f", one of {verdict.equals} equals" if verdict.equals > 1 else ""
            table.add_row(f"{verdict.place}.", verdict.model.name, *_prices(verdict), f"{verdict.why}{shared}")
        show_table(table)
    if explained.dropped:
        if explained.kept:
            say()
        say("Not asked", "bold")
        left_out = columns("model", "expected", "at most", "rule", "why", right=("expected", "at most"), wrap=("why",))
        for verdict in explained.dropped:
            left_out.add_row(verdict.model.name, *_prices(verdict), verdict.rule, verdict.why)
        show_table(left_out)
    budgets = {name: left for verdict in explained.verdicts for name, left in verdict.budgets.items()}
    if budgets:
        say()
        say("Left in budgets: " + ", ".join(f"{name} {dollars(left)}" for name, left in budgets.items()))
    first = explained.kept[0].estimate if explained.kept else None
    if first is None:
        return
    length = {
        "max_tokens": "as long as `max_tokens` allows",
        "history": "as long as its replies usually are",
        "assumed": "a guess, as it has no history yet",
        "no reply": "no reply",
    }[first.basis]
    say()
    note(f"{first.input_tokens:,} tokens in, {first.output_tokens:,} out expected ({length}). Nobody was called.")


def _prices(verdict: Verdict) -> tuple[str, str]:
    if verdict.estimate is None:
        return "", ""
    return dollars(verdict.estimate.expected), dollars(verdict.estimate.worst_case)


def _explained_values(explained: Explanation) -> dict[str, Any]:
    kept = explained.kept
    return {
        "candidates": [
            {"model": verdict.model.name, "reason": verdict.why, "equals": verdict.equals, **_facts(verdict)}
            for verdict in kept
        ],
        "dropped": [
            {"model": verdict.model.name, "rule": verdict.rule, "why": verdict.why, **_facts(verdict)}
            for verdict in explained.dropped
        ],
        "worst_case": max((each.estimate.worst_case for each in kept if each.estimate), default=None),
    }


def _facts(verdict: Verdict) -> dict[str, Any]:
    model = verdict.model
    return {
        "provider_id": model.provider_id,
        "model_id": model.id,
        "estimate": None if verdict.estimate is None else verdict.estimate._asdict(),
        "compared_cost": verdict.compared,
        "priority": verdict.priority,
        "weight": model.weight,
        "circuit": verdict.circuit,
        "throttled_seconds": None if math.isinf(verdict.throttled_seconds) else verdict.throttled_seconds,
        "latency_seconds": verdict.latency_seconds,
        "budgets": verdict.budgets,
        "capabilities": {
            "tasks": model.tasks,
            "vision": model.vision,
            "audio": model.audio,
            "function_calling": model.function_calling,
            "context_window": model.context_window,
            "max_output_tokens": model.max_output_tokens,
        },
    }


def _show_cost(reply: Reply) -> None:
    for attempt in reply.attempts:
        if attempt.error:
            why = f"{attempt.error} after {attempt.seconds:.1f} s"
            note(f"{attempt.provider_id}/{attempt.model_id} failed: {why}", "yellow")
    usage = reply.usage
    counted = ", counted by us" if usage.counted else ""
    cached = f" ({usage.cached_tokens:,} cached)" if usage.cached_tokens else ""
    tokens = f"{usage.input_tokens:,} tokens in{cached}, {usage.output_tokens:,} out{counted}"
    seconds = f"{sum(attempt.seconds for attempt in reply.attempts):.1f} s"
    who = f"{reply.provider_id}/{reply.model_id}"
    note(f"{who} · {tokens} · {dollars(reply.total_cost)} (estimated {dollars(reply.estimated_cost)}) · {seconds}")
