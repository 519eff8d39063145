"""One LLM provider, its key and its models."""

from __future__ import annotations

from typing import Any

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from sekha.config import LimitsSection, ModelSection
from sekha.registry import ProviderKind

__all__ = ["LLMProvider"]


class LLMProvider(Block):
    """
    An LLM provider: where it is, its key, and the models it offers. Edit it here and the next flow
    run uses it; nothing has to be deployed again.

    Example:
        Load a provider that `sekha blocks push` stored:
        ```python
        from blocks import LLMProvider

        provider = LLMProvider.load("BLOCK_NAME")
        ```
    """

    _block_type_name = "LLM Provider"
    _block_type_slug = "sekha-llm-provider"
    _documentation_url = "https://docs.prefect.io/v3/concepts/blocks"  # type: ignore[assignment]
    _description = "An LLM provider that Sekha routes to: address, key, priority, rate limits and models."

    provider_id: str = Field(description="Your name for the provider; unique in a configuration.")
    provider_type: ProviderKind = Field(description="Which protocol the provider speaks.")
    base_url: str | None = Field(default=None, description="Where it listens. Left out: its own address.")
    api_key: SecretStr | None = Field(default=None, description="The provider's API key.")
    priority: int = Field(default=50, ge=1, le=100, description="1 to 100; lower goes first.")
    timeout_secs: float = Field(default=120, gt=0, description="Seconds for one whole answer.")
    limits: LimitsSection = Field(default_factory=LimitsSection, description="The provider's rate limits.")
    models: list[ModelSection] = Field(default_factory=list, description="The models it offers.")

    def to_section(self) -> dict[str, Any]:
        """This provider as `sekha.yaml` would say it, with its key."""
        return {
            "id": self.provider_id,
            "provider_type": self.provider_type,
            "base_url": self.base_url,
            "api_key": self.api_key,
            "priority": self.priority,
            "timeout_secs": self.timeout_secs,
            "limits": self.limits.model_dump(),
            "models": [model.model_dump(exclude_none=True) for model in self.models],
        }
