"""What `sekha.yaml` may say: one pydantic model for each section, each field with its meaning."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, WithJsonSchema

from sekha.registry import COLLECTION_NAME, ProviderKind, Task

__all__ = [
    "ALSO_ACCEPTED",
    "NOT_NEEDED",
    "BackupSection",
    "BudgetSection",
    "CircuitBreaker",
    "CollectionSection",
    "Config",
    "DefaultModels",
    "KeySection",
    "LedgerSection",
    "LimitsSection",
    "MemorySection",
    "MigrationsSection",
    "ModelSection",
    "PriceSection",
    "ProviderSection",
    "RecordingSection",
    "Routing",
    "StoreSection",
    "VisionCapabilities",
    "json_schema",
]


LONGEST_SECONDS = 86_400
"""A day. No clock counts for ever, and whoever writes more means something else."""
Seconds: TypeAlias = Annotated[float, Field(le=LONGEST_SECONDS, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)


class VisionCapabilities(Section):
    max_images: int = Field(10, ge=1, description="Images that one request may carry.")
    max_image_size_mb: float = Field(20, gt=0, description="Size of one image, in megabytes.")
    supported_formats: tuple[str, ...] = Field(
        ("jpg", "jpeg", "png", "gif", "webp"), description="Image formats that the model reads."
    )


class PriceSection(Section):
    input_per_million: Decimal = Field(ge=0, description="US dollars for a million input tokens.")
    output_per_million: Decimal = Field(Decimal(0), ge=0, description="US dollars for a million output tokens.")
    cached_input_per_million: Decimal | None = Field(
        None, ge=0, description="US dollars for a million input tokens that the provider had cached."
    )
    cache_write_per_million: Decimal | None = Field(
        None, ge=0, description="US dollars for a million input tokens that the provider is asked to cache."
    )
    per_image: Decimal | None = Field(None, ge=0, description="US dollars for an input image, where priced apart.")


def _price(value: object) -> object:
    if value == "free":
        return {"input_per_million": 0}
    if isinstance(value, str):
        raise ValueError("must be `free`, or a mapping with `input_per_million` and `output_per_million`")  # noqa: TRY004 - pydantic reports ValueError only
    return value


class ModelSection(Section):
    model_id: str = Field(min_length=1, description="The model's name at its provider.")
    task: Task = Field(description="What the model is used for. One model may be listed under several tasks.")
    context_window: int | None = Field(
        None, ge=1, description="Tokens of input and reply together. Left out: LiteLLM's map."
    )
    max_output_tokens: int | None = Field(
        None, ge=1, description="Tokens of the longest reply. Left out: LiteLLM's map."
    )
    dimension: int | None = Field(
        None, ge=1, le=65_536, description="Numbers in a vector. Required for embedding models."
    )
    revision: str | None = Field(
        None, min_length=1, description="Of an embedding model, where the same name has come to give other vectors."
    )
    same_as: str | None = Field(
        None,
        pattern=r"^[^/\s:]+/[^\s:]+(:[^\s:]+)?$",
        description="`family/model` whose vectors these are, when a gateway gives an embedding model another name.",
    )
    query_prefix: str = Field("", description="What the model wants before a question: `search_query: `.")
    document_prefix: str = Field("", description="What it wants before a text to be found: `search_document: `.")
    supports_vision: bool = Field(False, description="Whether the model takes images.")
    supports_audio: bool | None = Field(
        None, description="Whether the model takes audio. Left out: LiteLLM's map, else unknown."
    )
    supports_function_calling: bool | None = Field(
        None, description="Whether the model calls tools. Left out: LiteLLM's map, else unknown."
    )
    vision_capabilities: VisionCapabilities | None = Field(None, description="Limits on the images it takes.")
    weight: int = Field(1, ge=1, description="Share of the traffic among equal candidates.")
    price: Annotated[
        PriceSection | None,
        BeforeValidator(_price),
        WithJsonSchema({"anyOf": [{"const": "free"}, PriceSection.model_json_schema(), {"type": "null"}]}),
    ] = Field(None, description="What tokens cost here, or `free`. Left out: LiteLLM's map.")


class LimitsSection(Section):
    requests_per_minute: int | None = Field(None, ge=1, description="Requests a minute that the provider allows.")
    tokens_per_minute: int | None = Field(None, ge=1, description="Tokens a minute that the provider allows.")


class ProviderSection(Section):
    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Your name for the provider; unique.")
    provider_type: ProviderKind = Field(description="Which protocol it speaks. Also accepted: `type`.")
    base_url: str | None = Field(
        None, pattern=r"^https?://", description="Where it listens. Left out: its own address."
    )
    api_key: SecretStr | None = Field(
        None, description="`${NAME}` of an environment variable, or `${block:NAME}` of a Prefect Secret block."
    )
    priority: int = Field(50, ge=1, le=100, description="1 to 100; lower goes first.")
    timeout_secs: Seconds = Field(120, gt=0, description="Seconds for one whole answer.")
    limits: LimitsSection = Field(LimitsSection(), description="The provider's rate limits.")
    models: tuple[ModelSection, ...] = Field((), description="The models it offers.")


class DefaultModels(Section):
    embedding: str | None = Field(None, description="Embeds what names no other model.")
    chat_fast: str | None = Field(None, description="Answers where speed counts.")
    chat_smart: str | None = Field(None, description="Answers where quality counts.")
    chat_vision: str | None = Field(None, description="Answers where there are images.")


class CircuitBreaker(Section):
    failure_threshold: int = Field(3, ge=1, description="Failures in a row that open the circuit.")
    timeout_secs: Seconds = Field(60, gt=0, description="Seconds until an open circuit lets one probe through.")
    success_threshold: int = Field(2, ge=1, description="Probes in a row that close it again.")


class Routing(Section):
    auto_fallback: bool = Field(True, description="Whether another provider is asked when one fails.")
    require_vision_for_images: bool = Field(True, description="Whether images demand a model that sees.")
    cost_aware: bool = Field(True, description="Whether the cheaper goes first among equal priorities.")
    max_cost_per_request: Decimal | None = Field(None, gt=0, description="US dollars; null for no limit.")
    circuit_breaker: CircuitBreaker = Field(CircuitBreaker(), description="When a failing provider is left alone.")


class CollectionSection(Section):
    model: str = Field(description="The embedding model under which the collection is kept and read.")


class StoreSection(Section):
    kind: Literal["embedded", "weaviate"] = Field("embedded", description="Which store keeps the vectors.")
    path: str = Field(".sekha/vectors.db", description="Embedded: the file, relative to this one.")
    url: str | None = Field(None, pattern=r"^https?://", description="Weaviate: its HTTP address.")
    grpc_port: int = Field(50051, ge=1, le=65_535, description="Weaviate: its gRPC port.")
    api_key: SecretStr | None = Field(None, description="Weaviate: `${NAME}` or `${block:NAME}`.")
    replication: int = Field(1, ge=1, description="Weaviate: copies of each object, for collections made from now on.")
    consistency: Literal["one", "quorum", "all"] = Field(
        "quorum", description="Weaviate: how many copies have to answer a read or a write."
    )
    quantizer: Literal["none", "rq-8"] = Field(
        "none",
        description="Weaviate: how vectors lie in memory, for collections made from now on. "
        "`rq-8` takes a quarter, and ranks the nearest anew by the whole vectors.",
    )
    query_timeout_secs: Seconds = Field(
        15, gt=0, description="Weaviate: seconds for a search or a look, tries included."
    )
    insert_timeout_secs: Seconds = Field(
        60, gt=0, description="Weaviate: seconds for one message of writes or deletes."
    )


class LedgerSection(Section):
    url: str = Field(
        "sqlite:///.sekha/ledger.db",
        pattern=r"^(sqlite:///|postgres(ql)?://)",
        description="`sqlite:///FILE`, relative to this file, or `postgresql://…`.",
    )


class BudgetSection(Section):
    name: str = Field(min_length=1, description="Its name; unique.")
    limit: Decimal = Field(ge=0, description="US dollars that may be spent in each period.")
    period: Literal["hour", "day", "month", "total"] = Field(
        "month", description="UTC periods after which it starts anew."
    )
    match: dict[Literal["key", "provider", "model", "task", "tag"], str] = Field(
        default_factory=dict,
        description="Which calls count: by key, provider, model (or `provider/model`), task, tag. Empty: all.",
    )


class KeySection(Section):
    name: str = Field(min_length=1, description="Whose key it is; unique.")
    hash: str = Field(
        pattern=r"^sha256:[0-9a-f]{64}$", description="The key's hash, as `sekha keys create` prints it; unique."
    )
    models: tuple[str, ...] = Field((), description="Models it may use, as `model` or `provider/model`; empty for all.")
    tasks: tuple[Task, ...] = Field((), description="Tasks it may use; empty for all.")
    requests_per_minute: int | None = Field(None, ge=1, description="Requests a minute; null for no limit.")
    tokens_per_minute: int | None = Field(None, ge=1, description="Tokens a minute; null for no limit.")
    reads: Literal["own", "all"] = Field(
        "own", description="What it finds in the memory: what it asked itself, or what any key did."
    )
    operator: bool = Field(
        False,
        description="Whether it is an operator's. Where any key is, metrics, costs and the state of providers are for "
        "those alone.",
    )


class MemorySection(Section):
    collection: str = Field(
        "conversations",
        pattern=f"^{COLLECTION_NAME.pattern}$",
        description="The collection that keeps what passes the gateway.",
    )


class RecordingSection(Section):
    sample: float = Field(1.0, ge=0, le=1, description="Share of requests recorded as flow runs.")
    max_per_second: float = Field(50, gt=0, description="Recorded at the most, each second.")
    keep: tuple[Literal["failed", "fallback", "refused", "slow"], ...] = Field(
        ("failed", "fallback", "refused", "slow"), description="What is recorded whatever the sample."
    )
    content: bool = Field(False, description="Whether prompts and replies are recorded too.")
    steps: Literal["joined", "all"] = Field(
        "joined",
        description="`all` makes each step a task run; `joined` makes one of quick steps that follow one another.",
    )
    retention_days: int = Field(14, ge=1, le=36_500, description="Days after which recorded runs are deleted.")


class BackupSection(Section):
    folder: str = Field(".sekha/backups", description="Where backups are kept, relative to this file.")
    keep: int = Field(7, ge=1, description="Backups named by their time that are kept. Those given a name all stay.")
    backend: Literal["filesystem", "s3", "gcs", "azure"] = Field(
        "filesystem", description="Where a Weaviate server keeps its part, by its module `backup-…`."
    )


class MigrationsSection(Section):
    window: str | None = Field(
        None, pattern=r"^\d\d:\d\d-\d\d:\d\d$", description="Hours in which they run: `01:00-06:00`."
    )
    max_cost: Decimal | None = Field(None, gt=0, description="US dollars that one migration may cost.")
    live_share: float = Field(0.3, ge=0, le=1, description="Live traffic's share of the rate limits.")


class Config(Section):
    """Everything the file declares, validated. `sekha.open` and the flows start from it."""

    version: str = Field("2.0", description="Version of the format. Also accepted: `config_version`.")
    providers: tuple[ProviderSection, ...] = Field((), description="Where models are. Also accepted: `llm_providers`.")
    default_models: DefaultModels = Field(DefaultModels(), description="Which model goes first, by role.")
    routing: Routing = Field(Routing(), description="How a model is chosen, and what happens when it fails.")
    unknown_price: Literal["refuse", "free"] = Field(
        "refuse", description="What to do with a model whose price nobody knows. Local providers are free."
    )
    collections: dict[str, CollectionSection] = Field(
        default_factory=dict, description="What is kept, under which model."
    )
    store: StoreSection = Field(StoreSection(), description="Where vectors are kept.")
    ledger: LedgerSection = Field(LedgerSection(), description="Where spending is recorded.")
    budgets: tuple[BudgetSection, ...] = Field((), description="What may be spent.")
    keys: tuple[KeySection, ...] = Field((), description="Who may use the gateway.")
    allow_unauthenticated: bool = Field(
        False, description="Whether the gateway may listen beyond loopback without keys, or lose them by a reload."
    )
    memory: MemorySection | None = Field(None, description="Whether the gateway keeps what passes it.")
    recording: RecordingSection = Field(RecordingSection(), description="Which requests Prefect shows.")
    migrations: MigrationsSection = Field(MigrationsSection(), description="Limits on changes of model.")
    backup: BackupSection = Field(BackupSection(), description="Where backups go, and how many are kept.")
    server_host: str = Field("127.0.0.1", description="Where the gateway listens.")
    server_port: int = Field(5001, ge=1, le=65_535, description="The gateway's port.")
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
    ] = Field("info", description="How much is logged.")


ALSO_ACCEPTED: Mapping[str, str] = {"config_version": "version", "llm_providers": "providers"}


NOT_NEEDED = frozenset(
    {"celery_broker_url", "celery_result_backend", "redis_url", "celery", "broker_url", "result_backend"}
)
"""Keys of the original that load with a warning."""

_REFERENCE = {"type": "string", "pattern": r"\$\{[^}]+\}"}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of `sekha.yaml`, for editors: it takes what `load` takes, as people write it."""
    schema = Config.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section["properties"] = {name: _or_reference(field) for name, field in section.get("properties", {}).items()}
    # A section with nothing under it says nothing, like one left out.
    properties: dict[str, Any] = {
        name: {"anyOf": [field, {"type": "null"}]} for name, field in schema["properties"].items()
    }
    properties["version"] = {
        "type": ["string", "number", "null"],
        "description": schema["properties"]["version"]["description"],
    }
    properties |= {other: properties[name] for other, name in ALSO_ACCEPTED.items()}
    properties |= {name: {"deprecated": True, "description": "Not needed, and ignored."} for name in sorted(NOT_NEEDED)}
    provider = schema["$defs"]["ProviderSection"]
    provider["properties"]["type"] = provider["properties"]["provider_type"]
    provider["required"] = ["id"]
    provider["anyOf"] = [{"required": ["provider_type"]}, {"required": ["type"]}]
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "sekha.yaml"}
    return title | {key: value for key, value in schema.items() if key != "title"} | {"properties": properties}


def _or_reference(field: dict[str, Any]) -> dict[str, Any]:
    """A single value, or `${NAME}` in its place."""
    single = any(
        part.get("type") in ("integer", "number", "boolean") or part.keys() & {"enum", "const", "pattern"}
        for part in (field, *field.get("anyOf", ()))
    )
    if not single:
        return field
    kept = {key: field[key] for key in ("description", "default") if key in field}
    return kept | {"anyOf": [{key: value for key, value in field.items() if key not in kept}, _REFERENCE]}
