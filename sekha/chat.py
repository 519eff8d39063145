"""Answer one request: estimate, select, reserve, call, settle. The order is written here, once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol, cast

from sekha.apart import check_no_other_model, chooses_a_host, is_of_provider
from sekha.asks import Allowed
from sekha.calling import Attempt
from sekha.errors import InvalidRequest
from sekha.ledger import Hold, Scope
from sekha.messages import as_object, as_objects, kind_of, parts_of
from sekha.pricing import Usage
from sekha.providers.base import RawStream
from sekha.rates import Taken
from sekha.registry import Task
from sekha.routing import Ask, Candidate, Estimates, Plan
from sekha.settling import let_go, reserved, settled
from sekha.tokens import MEDIA
from sekha.values import value
from sekha.vision import Pictures, pictures_in

__all__ = [
    "MOST_TOKENS",
    "REPLY_LIMITS",
    "ChatRequest",
    "ChatSteps",
    "Opened",
    "Piped",
    "Reply",
    "StreamSteps",
    "answer",
    "carried_out",
    "stream",
    "thinking_of",
    "with_reply_limit",
]

REPLY_LIMITS = ("max_tokens", "max_completion_tokens")
"""OpenAI's two names for the longest reply, the old and the new."""
MOST_TOKENS = 10**9
"""That a reply may be limited to, or replies asked for: more than any model says, and few enough to be multiplied."""
_THOUGHTS = {"minimal": 1024, "low": 1024, "medium": 2048, "high": 4096, "xhigh": 8192, "max": 16384}
"""Tokens that LiteLLM has a model think for at each `reasoning_effort`, where that is told a number of them."""
ORDINARY_TIERS = (None, "auto", "default", "flex", "standard_only")
"""Service tiers that cost no more than the ordinary one."""
ORDINARY_TTLS = (None, "5m")
"""How long input may stay cached at the price map's price of writing it."""
_DATA = ("url", "file_data", "data")
"""Where the data of an image, a file or a sound stand."""
_HEARD = frozenset({"audio", "input_audio", "audio_url", "video", "video_url", "input_video"})
"""Parts whose tokens have prices of their own, since there is sound in them."""


@value
class ChatRequest:
    """What a caller wants answered. Every field but ours is passed through as it came."""

    messages: tuple[Mapping[str, Any], ...] = field(repr=False)
    """In OpenAI's shape: `{"role": "user", "content": "…"}`; content may be parts with images."""
    model: str | None = None
    """A model, `provider/model`, a task's name, `auto`; left out, the default model."""
    task: Task | None = None
    preferred_model: str | None = None
    require_vision: bool = False
    max_cost: Decimal | None = None
    """US dollars that this request may cost at the most."""
    max_tokens: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """OpenAI's other fields: `temperature`, `tools`, `response_format` …"""
    tags: frozenset[str] = frozenset()
    key: str | None = None
    """The name of the caller's key, whose budgets it counts against."""
    allowed: Allowed | None = None
    """What that key may use; None for everything."""
    _parts: list[Mapping[str, Any]] = field(init=False, repr=False, compare=False)
    """All parts of all messages whose content is no plain text, and what was said aloud before."""
    _marks: list[object] = field(init=False, repr=False, compare=False)
    """Every `cache_control`, wherever one may stand."""
    _pictures: list[Pictures | None] = field(init=False, repr=False, compare=False)
    """The images, once they were read."""

    def __post_init__(self) -> None:
        if not isinstance(self.messages, (tuple, list)):
            raise InvalidRequest(f"`messages` must be a list, not {kind_of(self.messages)}.", field="messages")
        if not self.messages:
            raise InvalidRequest("`messages` is empty: send at least one.", field="messages")
        parts: list[Mapping[str, Any]] = []
        marks: list[object] = []
        for at, message in enumerate(cast("tuple[object, ...]", self.messages)):
            # A dict first: to ask an abstract class costs more than all the rest.
            if not isinstance(message, (dict, Mapping)) or not isinstance(message.get("role"), str):
                raise InvalidRequest(f"`messages[{at}]` needs a `role` and `content`.", field=f"messages[{at}]")
            if len(message) == 2 and type(message.get("content")) is str:
                continue  # nearly all are so
            if type(message.get("content")) is not str or "tool_calls" in message:
                parts += parts_of(message, f"messages[{at}]")
            if message.get("audio") is not None:
                parts.append({"type": "audio", "audio": message["audio"]})
            if "cache_control" in message:
                marks.append(message["cache_control"])
        for part in (*_tools_in(self.options), *parts):
            if "cache_control" in part:
                marks.append(part["cache_control"])
        # Looked through once, for all that is asked about them.
        self._parts, self._marks, self._pictures = parts, marks, []  # type: ignore[misc]
        if self.max_tokens is not None:
            _check_count("max_tokens", self.max_tokens)
        if self.max_cost is not None and self.max_cost < 0:
            raise InvalidRequest(f"`max_cost` is {self.max_cost}; it must be 0 or more.", field="max_cost")

    @property
    def reply_limit(self) -> int | None:
        """Tokens that the caller allows each reply, by whichever of OpenAI's names."""
        if not self.options:
            return self.max_tokens
        limits = [limit for name in REPLY_LIMITS if (limit := self.options.get(name)) is not None]
        if self.max_tokens is not None:
            limits.append(self.max_tokens)
        return min(limits) if limits else None

    @property
    def replies(self) -> int:
        """How many replies the caller wants, and pays for."""
        return int(self.options.get("n") or 1)

    @property
    def thinking(self) -> int:
        """Tokens that the reply is to think for, at a model that is told a number of them; 0 for none."""
        return thinking_of(self.options) if self.options else 0

    @property
    def writes_cache(self) -> bool:
        """Whether the caller asks the provider to cache input, which some take more for."""
        return bool(self._marks)

    @property
    def image_count(self) -> int:
        parts = self._parts
        return sum(part.get("type") == "image_url" for part in parts) if parts else 0

    @property
    def pictures(self) -> Pictures | None:
        """The images, read once; None when there is none. Raises `InvalidRequest` for one that nobody could take."""
        if not self._parts:
            return None
        if not self._pictures:
            self._pictures.append(pictures_in(self.messages))
        return self._pictures[0]

    @property
    def tools_field(self) -> str | None:
        """The field that names tools to call, by either of OpenAI's names; None where there are none."""
        return next((name for name in ("tools", "functions") if self.options.get(name)), None)

    @property
    def priced_apart(self) -> str | None:
        """What in the request a provider bills otherwise than by the prices of its tokens; None if nothing is."""
        if self.options:
            if self.options.get("web_search_options") is not None:
                return "web_search_options"
            if "audio" in (self.options.get("modalities") or ()):
                return "modalities"
            if self.options.get("plugins"):
                return "plugins"
            if chooses_a_host(self.options.get("provider")):
                return "provider"
            if self.has_tools_of_providers:
                return "tools"
        for part in self._parts:
            kind = _kind(part)
            if kind in _HEARD or (kind == "file" and _is_heard(part.get("file"))):
                return kind
        if self._marks and any(
            isinstance(mark, Mapping) and mark.get("ttl") not in ORDINARY_TTLS for mark in self._marks
        ):
            return "cache_control.ttl"
        # The last, since it alone may have a price in the map.
        return None if self.options.get("service_tier") in ORDINARY_TIERS else "service_tier"

    @property
    def tier(self) -> str | None:
        """The service tier that is asked for, where that may be dearer than the ordinary one."""
        return "priority" if self.options.get("service_tier") == "priority" else None

    @property
    def data_parts(self) -> Iterator[tuple[str, int, str]]:
        """Each image and file: its kind, the characters of its data if they are here, and an image's `detail`."""
        for part in self._parts:
            if (kind := _kind(part)) == "image_url" or kind in MEDIA:
                held = part.get(kind)
                held = held if isinstance(held, Mapping) else {"url": held}
                data = next((each for name in _DATA if isinstance(each := held.get(name), str)), "")
                yield kind, len(data), str(held.get("detail") or "auto")

    @property
    def unbounded(self) -> str | None:
        """What in the request is as many tokens as its provider makes of it; None where all can be counted."""
        found = next((kind for part in self._parts if (kind := _kind(part)) in MEDIA), None) if self._parts else None
        # What such a tool reads goes in as well.
        return found or ("tools" if self.options and self.has_tools_of_providers else None)

    @property
    def has_tools_of_providers(self) -> bool:
        """Whether the provider is given tools that it runs itself, so that more goes in as it answers."""
        return any(is_of_provider(tool) for tool in self.options.get("tools") or ())

    def ask(self, *, images_need_vision: bool = True) -> Ask:
        """What routing has to know of the request."""
        pictures = self.pictures
        # In the order of its fields: by their names it takes twice as long to make.
        return Ask(
            "chat",
            self.model,
            self.task,
            self.preferred_model,
            self.require_vision or (images_need_vision and pictures is not None),
            pictures,
            self.max_cost,
            self.priced_apart,
            False,
            self.key,
            self.allowed,
            self.tags,
            self.tools_field if self.options else None,
            bool(self._parts) and any(part.get("type") == "input_audio" for part in self._parts),
            self.tier if self.options else None,
        )


@value
class Reply:
    """An answer, who gave it, and what it cost."""

    text: str = field(repr=False)
    body: Mapping[str, Any] = field(repr=False)
    """The whole answer in OpenAI's `chat.completion` shape; empty when it went out in pieces."""
    provider_id: str
    model_id: str
    usage: Usage
    estimated_cost: Decimal
    worst_case: Decimal
    """Dollars that the call was not to pass."""
    cost: Decimal
    attempts: tuple[Attempt, ...]
    reason: str
    """Why this model was chosen."""
    charged_to: Scope
    raw: bytes | None = field(default=None, repr=False)
    """`body` as the provider wrote it, where it came in OpenAI's shape."""
    lost_cost: Decimal = Decimal(0)
    """Dollars for attempts before it that failed and may be billed all the same; no part of `cost`."""
    replies: int = 1
    """As many as were asked for (`n`), whose tokens `usage` has together."""

    @property
    def total_cost(self) -> Decimal:
        """Dollars that the request was charged."""
        return self.cost + self.lost_cost


def _tools_in(options: object) -> Sequence[Mapping[str, Any]]:
    """The tools of a request. Refuses what is not as counting, pricing and routing take it."""
    if not isinstance(options, (dict, Mapping)):
        raise InvalidRequest(f"`options` must be an object, not {kind_of(options)}.", field="options")
    if not options:
        return ()
    check_no_other_model(options)
    as_object(options.get("stream_options"), "stream_options")
    modalities = options.get("modalities")
    if modalities is not None and not isinstance(modalities, (list, tuple)):
        raise InvalidRequest(f"`modalities` must be a list, not {kind_of(modalities)}.", field="modalities")
    for name in (*REPLY_LIMITS, "n"):
        if (value := options.get(name)) is not None:
            _check_count(name, value)
    return as_objects(options.get("tools"), "tools")


def _kind(part: Mapping[str, Any]) -> str:
    kind = part.get("type")
    return kind if isinstance(kind, str) else ""


def _is_heard(file: object) -> bool:
    """Whether a file is sound or film, by the type that it is said to be."""
    if not isinstance(file, Mapping):
        return False
    said = str(file.get("format") or ""), str(file.get("file_data") or "")[:16].removeprefix("data:")
    return any(each.startswith(("audio", "video")) for each in said)


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or not 1 <= value <= MOST_TOKENS:
        raise InvalidRequest(f"`{name}` is {value!r}; it must be a whole number, 1 to {MOST_TOKENS:,}.", field=name)


def thinking_of(given: Mapping[str, Any]) -> int:
    """What `ChatRequest.thinking` says of these options."""
    effort, thinking = given.get("reasoning_effort"), given.get("thinking")
    tokens = _THOUGHTS.get(effort, 0) if isinstance(effort, str) else 0
    if isinstance(thinking, Mapping):
        if type(number := thinking.get("budget_tokens")) is int:
            tokens = max(tokens, min(number, MOST_TOKENS))
        elif thinking.get("type") == "adaptive":
            # As many as LiteLLM then says to a model that cannot choose for itself.
            tokens = max(tokens, _THOUGHTS["medium"])
    return tokens


def with_reply_limit(given: Mapping[str, Any], limit: int | None) -> Mapping[str, Any]:
    """The options with one limit of a reply's tokens, by the caller's own name for it where there is one."""
    if limit and given.get("max_tokens") == limit and "max_completion_tokens" not in given:
        return given  # as callers say it, and a copy of all that they say is saved
    options = {name: value for name, value in given.items() if name not in REPLY_LIMITS}
    if limit:
        named = given.get("max_completion_tokens") is not None
        options["max_completion_tokens" if named else "max_tokens"] = limit
    return options


class Piped(Protocol):
    """Where the pieces of a streamed answer go."""

    async def begin(self, opened: Opened) -> None:
        """Somebody is answering: the first piece is there."""
        ...

    async def write(self, piece: bytes) -> None:
        """Whole server-sent events, as OpenAI writes them."""
        ...


@value
class Opened:
    """An answer that has begun to arrive, and who gives it."""

    events: RawStream = field(repr=False)
    candidate: Candidate
    attempts: tuple[Attempt, ...]
    probe: str | None
    """Set when it is the one call that a half-open circuit lets through."""
    began_at: float
    """When it was asked for, by the clock of `Resources`."""
    charge: Callable[[Reply], Awaitable[None]] = field(repr=False)
    """Records the reply where an attempt before it failed and may be billed."""
    lost_cost: Decimal = Decimal(0)
    """Dollars for those attempts."""
    taken: Taken | None = None
    """What it took of the limits of its provider, until its end tells what it used."""


@dataclass(frozen=True, slots=True)
class ChatSteps:
    """The steps of a chat: plain callables in-process, Prefect tasks in a flow."""

    estimate: Callable[[ChatRequest], Awaitable[Estimates]]
    select: Callable[[ChatRequest, Estimates], Awaitable[Plan]]
    reserve: Callable[[Plan], Awaitable[Hold]]
    call: Callable[[ChatRequest, Plan, Hold], Awaitable[Reply]]
    settle: Callable[[Hold, Reply | None], Awaitable[None]]
    at_once: bool = False
    """Whether `reserve` and `settle` are safe to cancel, and so need no shield."""


@dataclass(frozen=True, slots=True)
class StreamSteps:
    """The steps of a chat whose answer is handed on while it arrives."""

    estimate: Callable[[ChatRequest], Awaitable[Estimates]]
    select: Callable[[ChatRequest, Estimates], Awaitable[Plan]]
    reserve: Callable[[Plan], Awaitable[Hold]]
    open: Callable[[ChatRequest, Plan, Hold], Awaitable[Opened]]
    relay: Callable[[ChatRequest, Plan, Hold, Opened, Piped], Awaitable[Reply]]
    settle: Callable[[Hold, Reply | None], Awaitable[None]]
    at_once: bool = False


async def answer(request: ChatRequest, steps: ChatSteps) -> Reply:
    """Answer one request. Money is held before anyone is called, and settled however it ends."""

    async def call(plan: Plan, hold: Hold) -> Reply:
        return await steps.call(request, plan, hold)

    return await _in_order(request, steps, call)


async def stream(request: ChatRequest, steps: StreamSteps, pipe: Piped) -> Reply:
    """Answer one request piece by piece: the same line, in which a call is opening and then relaying.

    Until the first piece another candidate may be asked; from then on a failure is raised with what
    had arrived on record. The reply has no `body`: its pieces have gone out.
    """

    async def call(plan: Plan, hold: Hold) -> Reply:
        opened = await steps.open(request, plan, hold)
        return await steps.relay(request, plan, hold, opened, pipe)

    return await _in_order(request, steps, call)


async def _in_order(
    request: ChatRequest, steps: ChatSteps | StreamSteps, call: Callable[[Plan, Hold], Awaitable[Reply]]
) -> Reply:
    estimates = await steps.estimate(request)
    plan = await steps.select(request, estimates)
    hold = await reserved(steps, plan)
    return await carried_out(steps, plan, hold, call)


async def carried_out(
    steps: ChatSteps | StreamSteps, plan: Plan, hold: Hold, call: Callable[[Plan, Hold], Awaitable[Reply]]
) -> Reply:
    """The rest of the line, where money is held: call, and settle however that ends."""
    try:
        reply = await call(plan, hold)
    except BaseException:
        await let_go(steps.settle, hold)
        raise
    await settled(steps, hold, reply)
    return reply
