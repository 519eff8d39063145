"""The line of an embedding, each of its steps a Prefect task."""

from __future__ import annotations

from typing import Final

from sekha.embedding import Embedded, EmbedSteps
from tasks.calls import embed_texts
from tasks.money import estimate_cost, reserve_budget, select_provider, settle_cost

__all__ = ["EMBEDDING"]

EMBEDDING: Final[EmbedSteps[Embedded]] = EmbedSteps(
    estimate=estimate_cost,
    select=select_provider,
    reserve=reserve_budget,
    embed=embed_texts,
    settle=settle_cost,
)
