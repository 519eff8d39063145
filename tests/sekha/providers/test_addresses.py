import pytest

from sekha.providers.addresses import base_url_of, stores_chats
from sekha.registry import ProviderKind


@pytest.mark.parametrize(
    ("kind", "written", "used"),
    [
        ("ollama", None, "http://localhost:11434"),
        ("ollama", "http://box:11434/", "http://box:11434"),
        ("ollama", "http://box:11434/v1", "http://box:11434"),
        ("ollama", "http://box:11434/api", "http://box:11434"),
        ("ollama", "http://box:11434/api/chat", "http://box:11434"),
        ("openai", None, "https://api.openai.com/v1"),
        ("openai", "https://api.openai.com", "https://api.openai.com/v1"),
        ("openai", "https://api.openai.com/v1/", "https://api.openai.com/v1"),
        ("openai", "http://box:8000/v1/chat/completions", "http://box:8000/v1"),
        ("openai", "https://box/openai/deployments/x", "https://box/openai/deployments/x"),
        ("anthropic", None, "https://api.anthropic.com"),
        ("anthropic", "https://api.anthropic.com/v1", "https://api.anthropic.com"),
        ("anthropic", "https://api.anthropic.com/v1/messages", "https://api.anthropic.com"),
        ("openrouter", None, "https://openrouter.ai/api/v1"),
        ("openrouter", "https://openrouter.ai", "https://openrouter.ai/api/v1"),
        ("openrouter", "https://openrouter.ai/api", "https://openrouter.ai/api/v1"),
        ("openrouter", "https://openrouter.ai/api/v1/", "https://openrouter.ai/api/v1"),
        ("litellm", None, None),
        ("litellm", "https://box/anything", "https://box/anything"),
    ],
)
def test_an_address_may_be_written_as_people_write_it(
    kind: ProviderKind, written: str | None, used: str | None
) -> None:
    assert base_url_of(kind, written) == used


@pytest.mark.parametrize(
    ("kind", "url", "stores"),
    [
        ("openai", "https://api.openai.com/v1", True),
        ("openai", "https://eu.api.openai.com/v1", True),
        ("openai", "https://team.openai.azure.com/openai/v1", True),
        ("openai", "https://api.mistral.ai/v1", False),
        ("openai", "https://notopenai.com/v1", False),
        ("openrouter", "http://127.0.0.1:9/api/v1", True),
    ],
)
def test_who_may_store_a_chat_is_known_by_the_address(kind: ProviderKind, url: str, stores: bool) -> None:
    assert stores_chats(kind, url) is stores
