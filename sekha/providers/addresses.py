"""Where a provider listens, from what people write."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from sekha.registry import ProviderKind

__all__ = ["base_url_of", "stores_chats"]

_DEFAULT_URLS: Mapping[ProviderKind, str] = {
    "ollama": "http://localhost:11434",
    "openai": "https://api.openai.com/v1",
    "anthropic": "https://api.anthropic.com",
    "openrouter": "https://openrouter.ai/api/v1",
}


_STORING = ("openai.com", "azure.com")


def stores_chats(kind: ProviderKind, base_url: str) -> bool:
    """Whether whoever listens there may store chats unless told otherwise."""
    host = urlsplit(base_url).hostname or ""
    return kind == "openrouter" or any(host == name or host.endswith(f".{name}") for name in _STORING)


def base_url_of(kind: ProviderKind, declared: str | None) -> str | None:
    """The address to call, from one with or without `/v1`, a slash or an endpoint."""
    if declared is None:
        return _DEFAULT_URLS.get(kind)
    url = declared.rstrip("/")
    for endpoint in ("/chat/completions", "/embeddings", "/messages", "/api/chat", "/api/embed", "/api/generate"):
        url = url.removesuffix(endpoint)
    match kind:
        case "ollama":
            return url.removesuffix("/v1").removesuffix("/api")
        case "anthropic":
            return url.removesuffix("/v1")
        case "openai":
            return url if urlsplit(url).path else f"{url}/v1"
        case "openrouter":
            return url if url.endswith("/v1") else f"{url.removesuffix('/api')}/api/v1"
        case _:
            return url
