"""Names → providers, models and spaces: what the configuration declares, resolved and frozen."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from pydantic import SecretStr

from sekha.errors import UnknownModel
from sekha.pricing import Price, price_of
from sekha.vision import Scheme, schemes_of

if TYPE_CHECKING:
    from sekha.config import Config, ModelSection, ProviderSection, VisionCapabilities
    from sekha.price_map import ModelLimits, PriceMap

__all__ = [
    "CHAT_TASKS",
    "COLLECTION_NAME",
    "TASKS",
    "Limits",
    "Model",
    "ProviderKind",
    "ProviderSpec",
    "Registry",
    "Space",
    "Task",
    "VisionLimits",
]

Task: TypeAlias = Literal["embedding", "chat_small", "chat_large", "chat_smart", "vision", "audio", "image_generation"]
TASKS: tuple[Task, ...] = get_args(Task)
ProviderKind: TypeAlias = Literal["builtin", "ollama", "openai", "anthropic", "openrouter", "litellm"]

COLLECTION_NAME = re.compile(r"[A-Za-z][_0-9A-Za-z]{0,200}")
CHAT_TASKS: tuple[Task, ...] = ("chat_small", "chat_large", "chat_smart", "vision")


@dataclass(frozen=True, slots=True)
class VisionLimits:
    max_images: int = 10
    max_image_size_mb: float = 20
    supported_formats: tuple[str, ...] = ("jpg", "jpeg", "png", "gif", "webp")
    url_schemes: tuple[Scheme, ...] = ("http", "https")
    """Of the URLs that its provider fetches images from; empty where it takes them only as data."""


@dataclass(frozen=True, slots=True)
class Limits:
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model at one provider. `price` is None when nobody knows it."""

    id: str
    provider_id: str
    tasks: tuple[Task, ...]
    context_window: int | None = None
    max_output_tokens: int | None = None
    dimension: int | None = None
    makes: str = ""
    """What its vectors are, wherever they are made: `openai/text-embedding-3-small`. Empty where it makes none."""
    query_prefix: str = ""
    """What stands before a question that it embeds."""
    document_prefix: str = ""
    """What stands before a text that it embeds to be found."""
    vision: bool = False
    audio: bool | None = None
    """Whether it takes audio; None where nobody says."""
    function_calling: bool | None = None
    """Whether it calls tools; None where nobody says."""
    vision_limits: VisionLimits = VisionLimits()
    thinks_by_number: bool = False
    """Whether a `reasoning_effort` is so many tokens to it, for which its reply's limit must have room."""
    weight: int = 1
    price: Price | None = None

    @property
    def name(self) -> str:
        """The name that no other model has: `openai/gpt-5-mini`."""
        return f"{self.provider_id}/{self.id}"

    @property
    def fingerprint(self) -> str:
        """What must be equal for two vectors to be comparable: `openai/text-embedding-3-small:1536:unit`.

        Provider family, model and revision; dimension; `unit`, since every store keeps vectors at unit length;
        and a hash of the prefix under which texts are embedded, where there is one.
        """
        prefix = self.document_prefix
        marked = f":{hashlib.sha256(prefix.encode()).hexdigest()[:8]}" if prefix else ""
        return f"{self.makes or self.id}:{self.dimension}:unit{marked}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderSpec:
    """One provider as declared. The key never shows when this is printed."""

    id: str
    kind: ProviderKind
    base_url: str | None = None
    api_key: SecretStr | None = None
    priority: int = 50
    """1 to 100, and the lower goes first."""
    timeout_seconds: float = 120.0
    limits: Limits = Limits()
    models: tuple[Model, ...] = ()


@dataclass(frozen=True, slots=True)
class Space:
    """Where vectors can be compared: one collection's vectors of one model."""

    collection: str
    """What users name: `documents`."""
    model: Model
    shared: bool = True
    """Whether any provider that has this model may embed for it; False when the file names one."""

    @property
    def asked_as(self) -> str:
        """The name under which its model is asked for: at any provider, or at the one that the file names."""
        return self.model.id if self.shared else self.model.name

    @property
    def dimension(self) -> int:
        if self.model.dimension is None:
            raise ValueError(f"{self.model.name!r} is no embedding model, so it makes no space")
        return self.model.dimension

    @property
    def fingerprint(self) -> str:
        """What must be equal for two vectors to be comparable."""
        return self.model.fingerprint


@dataclass(frozen=True)
class Registry:
    """Every provider and model that may be used. Models come in the providers' order of priority."""

    providers: Mapping[str, ProviderSpec]
    default_models: Mapping[str, str] = field(default_factory=dict)
    """`embedding`, `chat_fast`, `chat_smart`, `chat_vision` → the model that goes first."""
    collections: Mapping[str, str] = field(default_factory=dict)
    """Collection → the model under which it is read and written."""

    @classmethod
    def from_config(cls, config: Config, prices: PriceMap) -> Registry:
        """Resolve the file: prices and limits it leaves out come from the price map."""
        free = config.unknown_price == "free"
        return cls(
            providers={section.id: _provider(section, prices, unknown_is_free=free) for section in config.providers},
            default_models={role: name for role, name in config.default_models if name is not None},
            collections={name: section.model for name, section in config.collections.items()},
        )

    @cached_property
    def models(self) -> tuple[Model, ...]:
        by_priority = sorted(self.providers.values(), key=lambda provider: provider.priority)
        return tuple(model for provider in by_priority for model in provider.models)

    @cached_property
    def vision_limits(self) -> tuple[VisionLimits, ...]:
        """The different limits on images that there are."""
        return tuple(dict.fromkeys(model.vision_limits for model in self.models))

    @cached_property
    def worked_out(self) -> dict[Hashable, Any]:
        """What routing has worked out from this registry and keeps with it, since neither ever changes."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        # What was worked out is worked out again wherever it is unpickled.
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def provider_of(self, model: Model) -> ProviderSpec:
        return self.providers[model.provider_id]

    def for_task(self, task: Task) -> tuple[Model, ...]:
        return tuple(model for model in self.models if task in model.tasks)

    def named(self, name: str) -> tuple[Model, ...]:
        """The models a caller means by `gpt-5-mini` (at any provider) or `openai/gpt-5-mini`.

        Raises `UnknownModel` with the nearest name.
        """
        found = tuple(model for model in self.models if name in (model.name, model.id))
        if not found:
            raise UnknownModel(name, self._names())
        return found

    def space(self, collection: str) -> Space:
        """The space under which a collection is read and written.

        A collection the file does not name lives under the default embedding model.
        """
        if (name := self.collections.get(collection)) is not None:
            candidates: Sequence[Model] = self.named(name)
        else:
            candidates = self.default_for("embedding")
        for model in candidates:
            if model.dimension is not None:
                return Space(collection, model, shared=name != model.name)
        raise UnknownModel(name or "embedding", [model.id for model in self.for_task("embedding")])

    def default_for(self, role: str) -> tuple[Model, ...]:
        """The model that goes first for a role of `default_models`, else all of its task."""
        if name := self.default_models.get(role):
            return self.named(name)
        match role:
            case "embedding":
                return self.for_task("embedding")
            case "chat_vision":
                return tuple(model for model in self.chat_models() if model.vision)
            case _:
                return self.chat_models()

    def chat_models(self) -> tuple[Model, ...]:
        return tuple(model for model in self.models if any(task in model.tasks for task in CHAT_TASKS))

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for model in self.models for name in (model.id, model.name)))

    def __iter__(self) -> Iterator[Model]:
        return iter(self.models)


def _provider(section: ProviderSection, prices: PriceMap, *, unknown_is_free: bool) -> ProviderSpec:
    listed: dict[str, list[ModelSection]] = {}
    for model in section.models:
        listed.setdefault(model.model_id, []).append(model)
    return ProviderSpec(
        id=section.id,
        kind=section.provider_type,
        base_url=section.base_url,
        api_key=section.api_key,
        priority=section.priority,
        timeout_seconds=section.timeout_secs,
        limits=Limits(section.limits.requests_per_minute, section.limits.tokens_per_minute),
        models=tuple(_model(same, section, prices, unknown_is_free=unknown_is_free) for same in listed.values()),
    )


def _model(same: Sequence[ModelSection], section: ProviderSection, prices: PriceMap, *, unknown_is_free: bool) -> Model:
    """One model out of its entries, one for each task it is listed under."""
    first = same[0]
    known = prices.limits(section.provider_type, first.model_id)
    tasks = tuple(dict.fromkeys(entry.task for entry in same))
    written = next((entry.price for entry in same if entry.price is not None), None)
    configured: Price | None = None
    if written is not None:
        configured = Price(
            input=written.input_per_million,
            output=written.output_per_million,
            cached_input=written.cached_input_per_million,
            cache_write=written.cache_write_per_million,
            per_image=written.per_image,
        )
    return Model(
        id=first.model_id,
        provider_id=section.id,
        tasks=tasks,
        context_window=_least(entry.context_window for entry in same) or (known.context_window if known else None),
        max_output_tokens=_least(entry.max_output_tokens for entry in same)
        or (known.max_output_tokens if known else None),
        dimension=_first(entry.dimension for entry in same),
        makes=_vectors_of(same, section) if "embedding" in tasks else "",
        query_prefix=next((entry.query_prefix for entry in same if entry.query_prefix), ""),
        document_prefix=next((entry.document_prefix for entry in same if entry.document_prefix), ""),
        vision="vision" in tasks or any(entry.supports_vision for entry in same),
        audio="audio" in tasks or _said((entry.supports_audio for entry in same), known.audio if known else None),
        function_calling=_said(
            (entry.supports_function_calling for entry in same), known.function_calling if known else None
        ),
        thinks_by_number=_thinks_by_number(section.provider_type, first.model_id, known),
        vision_limits=_vision_limits(
            [entry.vision_capabilities for entry in same if entry.vision_capabilities],
            schemes_of(section.provider_type, first.model_id),
        ),
        weight=max(entry.weight for entry in same),
        price=price_of(
            configured,
            prices.price(section.provider_type, first.model_id),
            unknown_is_free=unknown_is_free,
        ),
    )


def _vectors_of(same: Sequence[ModelSection], section: ProviderSection) -> str:
    """Family, model and revision: one name for one model's vectors, however a gateway calls the model."""
    if declared := next((entry.same_as for entry in same if entry.same_as), None):
        return declared
    name = same[0].model_id.removesuffix(":latest")
    if section.provider_type in ("openrouter", "litellm"):
        # They name a model by who makes it: `openai/text-embedding-3-small`, `openrouter/openai/…`.
        name = name.removeprefix("openrouter/")
    else:
        name = f"{section.provider_type}/{name}"
    revision = next((entry.revision for entry in same if entry.revision), None)
    return f"{name}@{revision}" if revision else name


def _vision_limits(declared: Sequence[VisionCapabilities], schemes: tuple[Scheme, ...]) -> VisionLimits:
    if not declared:
        return VisionLimits(url_schemes=schemes)
    return VisionLimits(
        min(each.max_images for each in declared),
        min(each.max_image_size_mb for each in declared),
        tuple(
            each for each in declared[0].supported_formats if all(each in other.supported_formats for other in declared)
        ),
        schemes,
    )


def _thinks_by_number(kind: ProviderKind, model_id: str, known: ModelLimits | None) -> bool:
    """Claude before 4.6, as LiteLLM asks it; what the map does not know is taken for one of those."""
    if not (kind == "anthropic" or (kind == "litellm" and "claude" in model_id)):
        return False
    return known is None or (known.reasoning and not known.adaptive_thinking)


def _said(entries: Iterable[bool | None], mapped: bool | None) -> bool | None:
    """What the entries say of an ability, one that has it before one that has not; else what the map does."""
    said = [entry for entry in entries if entry is not None]
    return any(said) if said else mapped


def _least(values: Iterable[int | None]) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _first(values: Iterable[int | None]) -> int | None:
    return next((value for value in values if value is not None), None)
