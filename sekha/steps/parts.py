"""In how many calls texts to embed are sent, and of how many tokens the largest may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from sekha.embedding import EmbedRequest
from sekha.providers.carrying import HINTS
from sekha.registry import Model, ProviderKind, Registry

__all__ = ["FEWEST_TEXTS", "TEXTS_PER_CALL", "largest_of", "only_theirs", "texts_at_once", "texts_per_call"]

TEXTS_PER_CALL: Mapping[ProviderKind, int] = {"builtin": 4096, "openai": 512, "ollama": 128, "openrouter": 96}
"""Texts sent to a provider at once. Others may reach any API through LiteLLM, so they get the least, 96."""
FEWEST_TEXTS = 96


def texts_per_call(kind: ProviderKind) -> int:
    return TEXTS_PER_CALL.get(kind, FEWEST_TEXTS)


def only_theirs(request: EmbedRequest, model: Model) -> str | None:
    """The first field that only a provider whose protocol has it can heed; None where there is none."""
    for name, wanted in request.options.items():
        if wanted is None or name in HINTS or name == "encoding_format":
            continue
        if name != "dimensions" or wanted != model.dimension:
            return name
    return None


def texts_at_once(request: EmbedRequest, models: Iterable[Model], registry: Registry) -> int:
    """As many texts as go out together at the most, whichever of these models are asked."""
    most = 0
    for model in models:
        if only_theirs(request, model) is not None:
            return len(request.texts)  # what only they can heed goes to them in one piece
        most = max(most, texts_per_call(registry.provider_of(model).kind))
    return min(most, request.at_once or most)


def largest_of(tokens: Sequence[int], at_once: int) -> int:
    """Tokens of any so many texts that stand together, at the most."""
    if len(tokens) <= at_once:
        return sum(tokens)
    until = [0, *accumulate(tokens)]
    return max(end - begin for begin, end in zip(until, until[at_once:], strict=False))
