from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from sekha.errors import ConfigError, ConfigMissing
from sekha.loading import Loaded, find, load, parse
from sekha.price_map import PriceMap
from sekha.registry import TASKS, Registry

CANARY = "sk-canary-0123456789"
CAPITALS = "AKIAIOSFODNN7EXAMPLE"
HASH = f"sha256:{'0' * 64}"
VERSION_2_0 = """\
version: "2.0"
providers:
  - id: ollama_local
    provider_type: ollama
    base_url: http://localhost:11434
    priority: 1
    timeout_secs: 120
    models:
      - model_id: nomic-embed-text
        task: embedding
        context_window: 8192
        dimension: 768
        supports_vision: false
        supports_audio: false
        supports_function_calling: false
        vision_capabilities: {max_images: 10, max_image_size_mb: 20, supported_formats: [jpg, jpeg, png, gif, webp]}
      - model_id: "llama3.1:8b"
        task: chat_small
      - model_id: "llama3.1:70b"
        task: chat_smart
      - model_id: "llama3.1:70b"
        task: chat_large
  - id: openai
    provider_type: openai
    base_url: https://api.openai.com/v1
    api_key: ${OPENAI_API_KEY}
    priority: 2
    models:
      - {model_id: gpt-4o, task: vision, context_window: 128000, supports_vision: true}
default_models: {embedding: nomic-embed-text, chat_fast: "llama3.1:8b", chat_smart: "llama3.1:70b", chat_vision: null}
routing:
  auto_fallback: true
  require_vision_for_images: true
  cost_aware: true
  max_cost_per_request: 0.10
  circuit_breaker: {failure_threshold: 3, timeout_secs: 60, success_threshold: 2}
server_host: 0.0.0.0
server_port: 5001
log_level: info
"""

Write: TypeAlias = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str | bytes, name: str = "sekha.yaml") -> Path:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write


def problems(file: Path, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(file, environ=environ)
    return [str(problem) for problem in caught.value.problems]


def provider(**fields: Any) -> str:
    return json.dumps({"providers": [{"id": "a", "provider_type": "openai", **fields}]})


def both(small: dict[str, Any], sees: dict[str, Any]) -> str:
    """One model under two tasks."""
    return provider(
        models=[{"model_id": "m", "task": "chat_small", **small}, {"model_id": "m", "task": "vision", **sees}]
    )


# --- what loads ----------------------------------------------------------------------------


def test_a_2_0_file_loads_unchanged(write: Write) -> None:
    config = load(write(VERSION_2_0), environ={"OPENAI_API_KEY": CANARY}).config

    assert [section.id for section in config.providers] == ["ollama_local", "openai"]
    assert config.providers[0].models[0].dimension == 768
    assert [model.task for model in config.providers[0].models] == [
        "embedding",
        "chat_small",
        "chat_smart",
        "chat_large",
    ]
    assert config.providers[1].api_key is not None
    assert config.providers[1].api_key.get_secret_value() == CANARY
    assert config.routing.max_cost_per_request == Decimal("0.10")
    assert config.routing.circuit_breaker.failure_threshold == 3
    assert config.default_models.chat_vision is None
    assert (config.server_host, config.server_port, config.log_level) == ("0.0.0.0", 5001, "info")


def test_a_default_that_no_provider_lists_is_left_out_with_a_warning(write: Write) -> None:
    # 2.0's own example names models for chats, and lists one for embeddings alone.
    file = VERSION_2_0.replace('chat_smart: "llama3.1:70b"', 'chat_smart: "llama3.1:700b"')

    loaded = load(write(file), environ={"OPENAI_API_KEY": CANARY})

    line = 1 + file[: file.index("default_models")].count("\n")
    assert loaded.config.default_models.chat_smart is None
    assert loaded.config.default_models.chat_fast == "llama3.1:8b"
    [warning] = [each for each in loaded.warnings if "default" in each]
    assert warning == (
        f"line {line}: default_models.chat_smart: no model 'llama3.1:700b'. Did you mean 'llama3.1:70b'? "
        "No provider lists it, so it is left out."
    )


def test_2_0s_other_names_mean_the_same(write: Write) -> None:
    other = (
        VERSION_2_0.replace('version: "2.0"', "config_version: 2.0", 1)
        .replace("providers:", "llm_providers:", 1)
        .replace("provider_type:", "type:")
    )

    loaded = load(write(other, "other.yaml"), environ={"OPENAI_API_KEY": CANARY})

    assert loaded.config == load(write(VERSION_2_0), environ={"OPENAI_API_KEY": CANARY}).config


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"context_window": 9000, "price": {"input_per_million": "1.50", "output_per_million": 0}, "weight": 2},
        {"context_window": None, "price": None, "weight": 1},
        {"supports_vision": False, "supports_function_calling": False},
    ],
)
def test_one_model_under_two_tasks_is_what_either_entry_says(other: dict[str, Any], write: Write) -> None:
    said = {"context_window": 9000, "price": {"input_per_million": 1.5}, "weight": 2, "supports_function_calling": True}

    config = load(write(both(said, other)), environ={}).config
    (model,) = Registry.from_config(config, PriceMap({}))

    assert (model.context_window, model.weight, model.vision, model.function_calling) == (9000, 2, True, True)
    assert model.price is not None
    assert model.price.input == Decimal("1.5")


def test_of_what_a_model_takes_the_least_that_its_entries_say_holds_with_a_warning(write: Write) -> None:
    formats = {"supported_formats": ["jpg", "png"], "max_images": 3}
    chat = {"context_window": 4096, "max_output_tokens": 900, "vision_capabilities": formats}
    sees = {"supported_formats": ["png", "jpg", "gif"], "max_image_size_mb": 5}
    vision = {"context_window": 8192, "max_output_tokens": 800, "vision_capabilities": sees}

    loaded = load(write(both(chat, vision)), environ={})
    (model,) = Registry.from_config(loaded.config, PriceMap({}))

    assert (model.context_window, model.max_output_tokens) == (4096, 800)
    limits = model.vision_limits
    assert (limits.max_images, limits.max_image_size_mb, limits.supported_formats) == (3, 5, ("jpg", "png"))
    borne = [warning for warning in loaded.warnings if "What the least of its entries allows" in warning]
    assert len(borne) == 5
    assert any("models[1].context_window: is 8192, and models[0] says 4096 of 'm'" in each for each in borne)


def test_formats_in_another_order_are_no_difference(write: Write) -> None:
    said = [{"vision_capabilities": {"supported_formats": formats}} for formats in (["jpg", "png"], ["png", "jpg"])]

    assert not any("models[1]" in warning for warning in load(write(both(*said)), environ={}).warnings)


def test_keys_that_only_the_original_needs_are_named_in_a_warning(write: Write) -> None:
    loaded = load(write("celery_broker_url: redis://localhost\nproviders: []\n"), environ={})

    assert any("`celery_broker_url` is not needed" in warning for warning in loaded.warnings)


def test_an_empty_file_is_an_empty_configuration(write: Write) -> None:
    loaded = load(write("# nothing yet\n"), environ={})

    assert loaded.config.providers == ()
    assert any("No providers" in warning for warning in loaded.warnings)


@pytest.mark.parametrize(
    ("host", "warned"),
    [
        ("127.0.0.1", False),
        ("127.0.0.2", False),
        ("::1", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("10.0.0.1", True),
        ("localhost.example", True),
    ],
)
def test_who_asks_for_an_address_beyond_loopback_without_keys_is_warned(write: Write, host: str, warned: bool) -> None:
    loaded = load(write(f"server_host: '{host}'\n"), environ={})

    assert any("will listen on loopback only" in warning for warning in loaded.warnings) is warned


def test_a_section_with_nothing_under_it_says_nothing(write: Write) -> None:
    assert load(write("providers: []\nbudgets:\nrouting:\n"), environ={}).config.budgets == ()


def test_a_mapping_may_be_merged_from_an_anchor_and_overridden(write: Write) -> None:
    text = """\
providers:
  - &local {id: a, provider_type: ollama, priority: 7}
  - {<<: *local, id: b}
"""

    config = load(write(text), environ={}).config

    assert [(section.id, section.priority) for section in config.providers] == [("a", 7), ("b", 7)]


def test_money_is_read_exactly(write: Write) -> None:
    text = "budgets:\n  - {name: a, limit: 0.1}\n  - {name: b, limit: 1e-6}\n"

    assert [budget.limit for budget in load(write(text), environ={}).config.budgets] == [
        Decimal("0.1"),
        Decimal("1e-6"),
    ]


def test_relative_paths_start_from_the_files_folder(write: Write, tmp_path: Path) -> None:
    loaded = load(write("store: {path: data/vectors.db}\n", "here/sekha.yaml"), environ={})

    assert loaded.path(loaded.config.store.path) == tmp_path / "here" / "data" / "vectors.db"


def test_sekha_home_moves_relative_paths(write: Write, tmp_path: Path) -> None:
    loaded = load(write(""), environ={"SEKHA_HOME": str(tmp_path / "home")})

    assert loaded.path("x") == tmp_path / "home" / "x"


# --- where it is found ---------------------------------------------------------------------


def test_a_named_file_goes_before_the_environment(tmp_path: Path) -> None:
    environ = {"SEKHA_CONFIG": "b.yaml", "LLM_CONFIG_PATH": "c.yaml"}

    assert find("a.yaml", environ) == Path("a.yaml")
    assert find(None, environ) == Path("b.yaml")
    assert find(None, {"LLM_CONFIG_PATH": "c.yaml"}) == Path("c.yaml")


def test_without_a_name_it_looks_where_the_file_usually_lies(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert find(None, {}) is None
    for name in ("config.yaml", "config/llm_providers.yaml", "sekha.yaml"):
        write("", name)
        assert find(None, {}) == Path(name)


def test_without_a_file_the_built_in_models_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    loaded = load(environ={})

    assert [section.provider_type for section in loaded.config.providers] == ["builtin"]
    assert loaded.config.collections["documents"].model == "hashed-768"


@pytest.mark.parametrize(
    ("environ", "models"),
    [
        (
            {"OLLAMA_BASE_URL": "http://box:1"},
            [("nomic-embed-text", "embedding", 768), ("llama3.1:8b", "chat_small", None)],
        ),
        (
            {"OLLAMA_URL": "http://box:1", "EMBEDDING_MODEL": "mxbai-embed-large", "CHAT_MODEL": "qwen3"},
            [("mxbai-embed-large", "embedding", 1024), ("qwen3", "chat_small", None)],
        ),
        (
            {
                "OLLAMA_URL": "http://box:1",
                "EMBEDDING_MODEL": "my-own",
                "SUMMARIZATION_MODEL": "small",
                "VISION_MODEL": "eye",
            },
            [("my-own", "embedding", 768), ("small", "chat_small", None), ("eye", "vision", None)],
        ),
    ],
)
def test_version_1_variables_make_an_ollama_setup(
    environ: dict[str, str], models: list[tuple[str, str, int | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    config = load(environ={**environ, "HOST": "0.0.0.0", "PORT": "8000", "LOG_LEVEL": "INFO"}).config

    (ollama,) = config.providers
    assert (ollama.provider_type, ollama.base_url) == ("ollama", "http://box:1")
    assert [(model.model_id, model.task, model.dimension) for model in ollama.models] == models
    assert (config.server_host, config.server_port, config.log_level) == ("0.0.0.0", 8000, "info")


def test_the_registry_may_come_from_the_environment_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    providers = [
        {"id": "o", "type": "openai", "api_key": "${KEY}", "models": [{"model_id": "m", "task": "chat_small"}]}
    ]

    config = load(
        environ={
            "SEKHA__LLM_PROVIDERS": json.dumps(providers),
            "SEKHA__DEFAULT_MODELS": json.dumps({"chat_fast": "m"}),
            "KEY": CANARY,
        }
    ).config

    assert config.providers[0].provider_type == "openai"
    assert config.default_models.chat_fast == "m"


def test_the_environments_registry_replaces_the_files_and_its_lines(write: Write) -> None:
    found = problems(write(VERSION_2_0), SEKHA__LLM_PROVIDERS='[{"id": "o", "type": "opneai"}]')

    (wrong,) = (line for line in found if "provider_type" in line)
    assert not wrong.startswith("line")


def test_json_that_is_none_is_said_with_the_variables_name(write: Write) -> None:
    found = problems(write(""), SEKHA__LLM_PROVIDERS="[{")

    assert found[0].startswith("providers: the environment variable SEKHA__LLM_PROVIDERS is not valid JSON")


# --- references ----------------------------------------------------------------------------


def test_references_are_filled_anywhere_in_a_text(write: Write) -> None:
    text = "ledger: {url: 'postgresql://me:${PASSWORD}@${HOST:-localhost}/sekha'}\nserver_port: ${PORT}\n"

    config = load(write(text), environ={"PASSWORD": "p", "PORT": "99"}).config

    assert config.ledger.url == "postgresql://me:p@localhost/sekha"
    assert config.server_port == 99


def test_an_unset_variable_is_named_with_the_nearest_one_that_is_set(write: Write) -> None:
    found = problems(write(provider(api_key="${OPENAI_KEY}")), OPENAI_API_KEY=CANARY)

    assert found == [
        "line 1: providers[0].api_key: the environment variable 'OPENAI_KEY' is not set. Did you mean "
        "'OPENAI_API_KEY'? Set it: `export OPENAI_KEY=…`."
    ]


def test_a_block_is_read_by_who_can(write: Write) -> None:
    file = write(provider(api_key="${block:openai-key}"))

    loaded = load(file, environ={}, read_block={"openai-key": CANARY}.__getitem__)

    key = loaded.config.providers[0].api_key
    assert key is not None
    assert key.get_secret_value() == CANARY
    assert "no Prefect server is at hand" in problems(file)[0]


@pytest.mark.parametrize("key", [CANARY, "${OPENAI_API_KEY:-" + CANARY + "}", "Bearer ${OPENAI_API_KEY}"])
def test_a_key_in_the_file_itself_is_refused_and_not_repeated(key: str, write: Write) -> None:
    (found,) = problems(write(provider(api_key=key)), OPENAI_API_KEY="x")

    assert "must name an environment variable" in found
    assert CANARY not in found


# --- what is wrong -------------------------------------------------------------------------


def test_a_missing_file_is_named_with_the_nearest_one(write: Write, tmp_path: Path) -> None:
    write("", "sekha.yaml")

    with pytest.raises(ConfigMissing) as caught:
        load(tmp_path / "seka.yaml", environ={})

    assert "there is no such file. Did you mean 'sekha.yaml'?" in str(caught.value)


def test_a_folder_in_place_of_the_file_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigMissing, match="cannot be read: Is a directory"):
        load(tmp_path, environ={})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"providers: \xff\n", "not UTF-8 text: byte 11 is no character"),
        ("providers: [\n", "line 2: not valid YAML: while parsing a flow node"),
        ("a: b: c\n", "line 1: not valid YAML: mapping values are not allowed here"),
        ("- a\n- b\n", "must be a mapping of keys to values, not list"),
        ("x: &x [*x]\n", "an anchor holds itself"),
        ("when: 2026-99-99\n", "not valid YAML: month must be in 1..12"),
        ("a: 1\nb: !!bool perhaps\n", "line 2: not valid YAML: it is not what its tag says"),
        ("a: !!timestamp then\n", "line 1: not valid YAML: it is not what its tag says"),
        ("a: !!int ''\n", "line 1: not valid YAML: it is not what its tag says"),
        ("a: 1\n# \x1b[31mx\n", "line 2: not valid YAML: U+001B is a character that may not stand in it"),
        ("a: 1\n\nb: \0\n", "line 3: not valid YAML: U+0000 is a character that may not stand in it"),
        ("\x07", "line 1: not valid YAML: U+0007"),
        ("a\n\ufffe", "line 2: not valid YAML: U+FFFE"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("server_port: 1\nserver_port: 2\n", "line 2: server_port: written twice, first on line 1"),
        ("? [1, 2]\n: 3\n", "cannot be a key"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused(text: str | bytes, says: str, write: Write) -> None:
    assert says in problems(write(text))[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("provders: []\n", "line 1: provders: unknown key 'provders'. Did you mean 'providers'?"),
        (
            "routing:\n  cost_awre: true\n",
            "line 2: routing.cost_awre: unknown key 'cost_awre'. Did you mean 'cost_aware'?",
        ),
        (
            "store:\n  kind: weavate\n",
            "line 2: store.kind: must be one of embedded, weaviate, not 'weavate'. Did you mean",
        ),
        (
            "server_port: http\n",
            "line 1: server_port: must be a whole number, not 'http'",
        ),
        ("server_port: 70000\n", "line 1: server_port: must be less than or equal to 65535, not 70000."),
        (
            "providers: {id: a}\n",
            "line 1: providers: must be a list, not a mapping: write each entry on a line of its own",
        ),
        ("routing: [1]\n", "line 1: routing: must be a mapping of keys to values, not a list."),
        (provider(provider_type="opneai"), "providers[0].provider_type: must be one of builtin, ollama, openai"),
        (
            provider(base_url="localhost:1"),
            "providers[0].base_url: must start with http:// or https://, not 'localhost:1'.",
        ),
        (provider(priority=0), "providers[0].priority: must be greater than or equal to 1, not 0."),
        (provider(models=[{"task": "chat_small"}]), "providers[0].models[0].model_id: is required and missing."),
        (
            provider(models=[{"model_id": "m", "task": "embeding"}]),
            f"must be one of {', '.join(TASKS)}, not 'embeding'. Did you mean 'embedding'?",
        ),
        (
            provider(models=[{"model_id": "m", "task": "embedding"}]),
            "providers[0].models[0]: embedding model 'm' needs `dimension:`, the length of its vectors.",
        ),
        (
            provider(models=[{"model_id": "m", "task": "vision"}, {"model_id": "m", "task": "vision"}]),
            "'m' is listed for 'vision' twice, first as models[0].",
        ),
        (
            "providers:\n- id: a\n  provider_type: openai\n  models:\n"
            "  - {model_id: m, task: chat_small, weight: 2}\n"
            "  - {model_id: m, task: vision, weight: 3}\n",
            "line 6: providers[0].models[1].weight: is 3, and models[0] says 2 of 'm', which is one "
            "model whatever its task. Say it once for all of its tasks, or list it under a provider with another "
            "`id:`.",
        ),
        (
            both({"price": "free"}, {"price": {"input_per_million": 9}}),
            "providers[0].models[1].price.input_per_million: is 9, and models[0] says 0 of 'm'",
        ),
        (
            both({"price": {"input_per_million": 9, "per_image": 1}}, {"price": {"input_per_million": 9}}),
            "providers[0].models[1].price.per_image: is left out, and models[0] says 1 of 'm'",
        ),
        (
            both({"dimension": 8}, {"dimension": 16}),
            "providers[0].models[1].dimension: is 16, and models[0] says 8 of 'm'",
        ),
        (
            provider(models=[{"model_id": "m", "task": "vision", "price": "cheap"}]),
            "must be `free`, or a mapping with `input_per_million`",
        ),
        (
            "providers:\n- {id: a, provider_type: ollama}\n- {id: a, provider_type: openai}\n",
            "line 3: providers[1].id: 'a' is the id of providers[0] too. Each needs its own.",
        ),
        (
            "budgets:\n- {name: a, limit: 1}\n- {name: a, limit: 2}\n",
            "line 3: budgets[1].name: 'a' is the name of budgets[0] too",
        ),
        (
            f"keys:\n- {{name: a, hash: '{HASH}'}}\n- {{name: b, hash: '{HASH}'}}\n",
            "line 3: keys[1].hash: is the hash of keys[0] too, so it is the same key. Each needs its own",
        ),
        (
            f"keys:\n- {{name: a, hash: '{HASH}', models: [gpt-5, a/gpt-5, a/gpt5]}}\nproviders:\n"
            "- {id: a, provider_type: ollama, models: [{model_id: gpt-5, task: vision}]}\n",
            "line 2: keys[0].models[2]: no model 'a/gpt5'. Did you mean 'a/gpt-5'? Models are listed under",
        ),
        ("budgets:\n- {name: a, limit: -1}\n", "line 2: budgets[0].limit: must be greater than or equal to 0, not -1."),
        *[
            (
                text.format(f"0x{'f' * 5000}"),
                "line 1: not valid YAML: a number of thousands of digits means nothing here. Write a smaller one",
            )
            for text in (
                "server_port: {}\n",
                "version: {}\n",
                "? {}\n: 1\n",
                "ledger: {{url: {}}}\n",
                "budgets: [{{name: {}, limit: 1}}]\n",
            )
        ],
        ("providers:\n- {id: a, provider_type: openai, timeout_secs: .inf}\n", "timeout_secs: must be a finite number"),
        (provider(timeout_secs=1e12), "timeout_secs: must be less than or equal to 86400, not 1000000000000.0."),
        (
            "routing: {circuit_breaker: {timeout_secs: .inf}}\n",
            "line 1: routing.circuit_breaker.timeout_secs: must be a finite number, not inf.",
        ),
        (
            "routing: {circuit_breaker: {timeout_secs: 86401}}\n",
            "routing.circuit_breaker.timeout_secs: must be less than or equal to 86400, not 86401.",
        ),
        ("store: {query_timeout_secs: .inf}\n", "store.query_timeout_secs: must be a finite number, not inf."),
        ("store: {insert_timeout_secs: 1e9}\n", "store.insert_timeout_secs: must be less than or equal to 86400"),
        ("recording: {retention_days: 1000000}\n", "recording.retention_days: must be less than or equal to 36500"),
        ("budgets:\n- {name: a, limit: .inf}\n", "budgets[0].limit: must be a finite number"),
        (
            "budgets:\n- {name: a, limit: 1, match: {task: chat_smal}}\n",
            "line 2: budgets[0].match.task: no task 'chat_smal'. Did you mean 'chat_small'?",
        ),
        (
            "providers:\n"
            "- {id: a, provider_type: ollama, models: [{model_id: m, task: vision}]}\n"
            "- {id: b, provider_type: ollama, models: [{model_id: n, task: vision}]}\n"
            "budgets:\n- {name: x, limit: 1, match: {provider: a, model: b/n}}\n",
            "line 5: budgets[0].match: 'a' has no model 'b/n', so no call would ever match.",
        ),
        (
            "providers:\n"
            "- {id: a, provider_type: ollama, models: [{model_id: m, task: vision}]}\n"
            "- {id: b, provider_type: ollama, models: [{model_id: a/m, task: vision}]}\n"
            "budgets:\n- {name: x, limit: 1, match: {model: a/m}}\n",
            "line 5: budgets[0].match.model: 'a/m' is 'm' at 'a', and the id of another at 'b'. "
            "Write `provider: a, model: m` or `provider: b, model: a/m`.",
        ),
        (
            "providers:\n- {id: a, provider_type: ollama, models: "
            "[{model_id: m, task: vision}, {model_id: a/m, task: vision}]}\n"
            "budgets:\n- {name: x, limit: 1, match: {provider: a, model: a/m}}\n",
            "budgets[0].match.model: 'a/m' is 'm' at 'a', and the id of another at 'a'. Write `provider: a, model: m`.",
        ),
        (
            "providers:\n- {id: a, provider_type: ollama, models: [{model_id: m, task: vision}]}\n"
            "budgets:\n- {name: x, limit: 1, match: {provider: a, model: [m]}}\n",
            "line 4: budgets[0].match.model: must be text, not a list.",
        ),
        (
            "collections: {docs: {model: nomic}}\n",
            "collections.docs.model: no model 'nomic'. Models are listed under `providers:`.",
        ),
        ("collections: {a b: {model: m}}\n", "a collection's name is a letter, then letters, digits and underscores."),
        ("store: {kind: weaviate}\n", "line 1: store: a Weaviate store needs `url:`"),
        ("migrations: {window: all day}\n", "migrations.window: must match"),
        (provider(timeout_secs="soon"), "providers[0].timeout_secs: must be a number, not 'soon'."),
        ("routing: {max_cost_per_request: true}\n", "routing.max_cost_per_request: must be a number, not True."),
        ("log_level: 3\n", "log_level: must be one of"),
        ("providers:\n- {id: 3}\n", "line 2: providers[0].id: must be text, not 3: write it in quotes."),
        ("ledger: {url: 'postgresql://bob:pw@127.0.0.1:abc/db'}\n", "line 1: ledger.url: names a port that"),
        ("ledger: {url: 'postgresql://a:5432,b:99999/db'}\n", "ledger.url: names a port that is no number from 1"),
        ("ledger: {url: 'postgresql://bob:p/w@127.0.0.1/db'}\n", "ledger.url: names a port that is no number from 1"),
        ("ledger: {url: 'postgresql://[::1/db'}\n", "ledger.url: names a port that is no number from 1 to 65535."),
        ("ledger: {url: 'mysql://h/db'}\n", "ledger.url: must start with sqlite:/// or postgresql://, not"),
    ],
)
def test_what_is_wrong_is_said_with_line_key_value_and_the_nearest_valid_one(
    text: str, says: str, write: Write
) -> None:
    found = problems(write(text))

    assert any(says in problem for problem in found), found


def test_a_chat_model_is_no_models_of_a_collection(write: Write) -> None:
    text = (
        "collections: {docs: {model: m}}\n"
        + "providers: "
        + json.dumps([{"id": "a", "provider_type": "ollama", "models": [{"model_id": "m", "task": "chat_small"}]}])
    )

    assert "'m' is no embedding model: its task is chat_small." in problems(write(text))[0]


def test_collections_that_the_store_cannot_tell_apart_are_refused(write: Write) -> None:
    model = {"model_id": "m", "task": "embedding", "dimension": 3}
    text = (
        "collections: {docs: {model: m}, Docs: {model: m}}\n"
        + "providers: "
        + json.dumps([{"id": "a", "provider_type": "ollama", "models": [model]}])
    )

    assert "the store cannot tell it from 'docs'" in problems(write(text))[0]


def test_everything_wrong_is_said_at_once_in_the_files_order(write: Write) -> None:
    text = """\
provders: []
providers:
  - id: a
    provider_type: opneai
    api_key: ${NOT_SET}
    models:
      - {model_id: e, task: embedding}
server_port: 0
budgets:
  - {name: b, limit: 1, match: {provider: c}}
"""

    found = problems(write(text))

    assert [problem.split(":")[0] for problem in found] == ["line 1", "line 4", "line 5", "line 7", "line 8", "line 10"]


def test_a_key_may_use_a_model_by_its_name_alone_and_by_its_providers(write: Write) -> None:
    file = write(
        f"keys:\n- {{name: a, hash: '{HASH}', models: [gpt-5, a/gpt-5]}}\nproviders:\n"
        "- {id: a, provider_type: ollama, models: [{model_id: gpt-5, task: vision}]}\n"
    )

    assert load(file, environ={}).config.keys[0].models == ("gpt-5", "a/gpt-5")


@pytest.mark.parametrize(
    "text",
    [
        "providers: {id: a, api_key: '${KEY}'}\n",
        "providers:\n- {id: a, provider_type: '${KEY}'}\n",
        "providers:\n- {id: '!', provider_type: ollama, api_key: '${KEY}'}\n",
        "providers:\n- {id: a, provider_type: ollama, api_kei: '${KEY}'}\n",
        "providers:\n- {id: a, provider_type: ollama, api_key: {value: '${KEY}'}}\n",
        "providers:\n- {id: a, provider_type: ollama, base_url: 'ftp://${KEY}@x'}\n",
        "providers:\n- {id: a, provider_type: ollama, priority: '${KEY}'}\n",
        "ledger: {url: 'postgre://me:${KEY}@host'}\n",
        f"ledger: {{url: 'postgre://me:{CANARY}@host'}}\n",
        "store: ['${KEY}']\n",
        "keys:\n- {name: a, hash: ['${KEY}']}\n",
        f"providers:\n- {{id: a, provider_type: ollama, api_key: {CANARY}}}\n",
        f"providers:\n- {{id: a, provider_type: ollama, api_key: {CAPITALS}}}\n",
        f"providers:\n- [{{api_key: {CANARY}}}]\n",
        f"store: {{kind: weaviate, url: 'http://x', api_key: {CANARY}}}\n",
    ],
)
def test_no_secret_is_in_any_error(text: str, write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(text), environ={"KEY": CANARY})

    error: BaseException | None = caught.value
    while error is not None:
        assert CANARY not in f"{error!s} {error!r}"
        assert CAPITALS not in f"{error!s} {error!r}"
        error = error.__cause__ or error.__context__


def test_no_secret_shows_when_a_configuration_is_printed(write: Write) -> None:
    loaded: Loaded = load(write(VERSION_2_0), environ={"OPENAI_API_KEY": CANARY})

    assert CANARY not in repr(loaded)
    assert CANARY not in loaded.config.model_dump_json()


def test_a_document_of_plain_values_is_held_to_the_same_rules(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'provders'"):
        parse({"provders": ()}, source="a block", folder=tmp_path, environ={})
