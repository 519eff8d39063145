"""What may be spent."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Literal

from prefect.blocks.core import Block
from pydantic import Field

__all__ = ["Budget"]


class Budget(Block):
    """
    At most so many US dollars in each period, for the calls that match. No call passes it: money is
    held before a provider is asked.

    Example:
        Load a budget that `sekha blocks push` stored:
        ```python
        from blocks import Budget

        budget = Budget.load("BLOCK_NAME")
        ```
    """

    _block_type_name = "LLM Budget"
    _block_type_slug = "sekha-budget"
    _documentation_url = "https://docs.prefect.io/v3/concepts/blocks"  # type: ignore[assignment]
    _description = "US dollars that Sekha may spend in an hour, a day, a month or in total, on calls that match."

    budget_name: str = Field(description="Its name; unique in a configuration.")
    limit: Decimal = Field(ge=0, description="US dollars that may be spent in each period.")
    period: Literal["hour", "day", "month", "total"] = Field(
        default="month", description="UTC periods after which it starts anew."
    )
    match: dict[str, str] = Field(
        default_factory=dict, description="Which calls count: by key, provider, model, task, tag. Empty: all."
    )

    def to_section(self) -> dict[str, Any]:
        """This budget as `sekha.yaml` would say it."""
        return {"name": self.budget_name, "limit": self.limit, "period": self.period, "match": self.match}
