"""`POST /v1/embeddings`: vectors as the provider wrote them, where it speaks OpenAI's protocol."""

from __future__ import annotations

from sekha.embedding import embed as embed_in_order
from sekha.gateway.exchange import Exchange
from sekha.gateway.finished import UnderWay
from sekha.gateway.serving import BODY_MB, BODY_SECONDS, Serving
from sekha.gateway.weighing import weighed_embedding
from sekha.gateway.wire import embed_asked, embed_reply

__all__ = ["embed"]


async def embed(serving: Serving, x: Exchange) -> None:
    """Embed one text or many."""
    if x.begun is not None:
        return await x.begun.in_line()
    serving.keys.owner(x.authorization)  # before a body is read for nobody
    body = await x.body(limit_mb=BODY_MB, timeout_seconds=BODY_SECONDS)
    by = serving.keys.admit(x.authorization, tokens=0)
    request, keep = embed_asked(body, by=by)
    by.check(serving.resources.registry, request.model, "embedding" if request.model is None else None)
    by = await weighed_embedding(serving, by, body, request)
    under_way = x.under_way = UnderWay(serving, "embed", request, by)
    try:
        embedded = await embed_in_order(request, serving.embed)
        if keep and serving.memory is not None:
            await serving.memory.vectors(under_way.run_id, request, embedded)
        said, headers = embed_reply(embedded, under_way.run_id)
        await x.answer(200, said, headers)
    except BaseException as error:
        under_way.failed(error)
        raise
    under_way.answered(embedded)
    return None
