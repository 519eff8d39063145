"""An embedding on the short way."""

from __future__ import annotations

from time import perf_counter
from typing import cast

from sekha.embedding import EmbedRequest, RawEmbedded
from sekha.gateway.begun import Shortened
from sekha.gateway.finished import UnderWay
from sekha.gateway.problems import money
from sekha.gateway.wire import answer_headers, embed_reply, embed_request, with_note
from sekha.ledger import Hold
from sekha.pricing import ChatUnits, most_of
from sekha.routing import Plan
from sekha.settling import let_go, settled
from sekha.steps.asking import Sent
from sekha.trace import Step

__all__ = ["BegunEmbedding"]

_NOT_OPTIONS = ("model", "input")


class BegunEmbedding(Shortened):
    """One text, or a few, whose vectors go out as the provider wrote them."""

    __slots__ = ("_dimension", "_texts")

    flow = "embed"
    page = "/v1/embeddings"

    def embed(self, texts: list[str], counts: list[int], size: int) -> bool:
        """Estimate, select, reserve and call, for texts of so many tokens each."""
        lane, tokens, longest = self._lane, sum(counts), max(counts)
        if self._fork is not None:
            self._units = self._fork.units
        else:
            most = tokens if lane.exact else most_of(tokens)
            self._units = ChatUnits(tokens * lane.tariff.input, most * lane.tariff.input, 0, None, "no reply")
        self._texts, self._tokens, self._requested = texts, tokens, None
        self._estimated_at = perf_counter()
        if (lane.window and longest > lane.window) or not self._reserve(self._units.worst_case, size):
            return False
        options = {name: value for name, value in self._given.items() if name not in _NOT_OPTIONS}
        body = {"input": texts[0] if len(texts) == 1 else texts, **options}
        sent = lane.provider.begin_embedding(lane.model, body, timeout_seconds=lane.timeout_seconds, told=self._told)
        return self._call(sent, size)

    def _go_on(self) -> None:
        lane, x = self._lane, self._x
        self._called_at = perf_counter()
        embedded = lane.provider.embedded_by(self._sent, lane.model, len(self._texts), self._given.get("dimensions"))
        if embedded is None or embedded.usage is None:
            x.hand_over()
            return
        self._dimension = embedded.dimension
        if self._settle(embedded.usage):
            x.answer_now(self._said(), b"%b%b\r\n" % (lane.lines, money(self.cost)))
            self._ended()
        else:
            x.hand_over()

    def _said(self) -> bytes:
        return with_note(self._sent.response.content, self._note(), b',"dimension":%d' % self._dimension)

    def _asked_for(self) -> dict[str, object]:
        return {"texts": len(self._texts)}

    def _calls(self) -> tuple[Step, ...]:
        return (Step("embed_raw", (1, 2), self._reserved_at, self._called_at),)

    def _request(self) -> EmbedRequest:
        return embed_request(self._given, by=self._by)

    async def _tell(self) -> None:
        await self._x.answer(200, self._said(), answer_headers(self.provider_id, self.model_id, self.cost))

    async def _call_in_line(self, under_way: UnderWay, plan: Plan, hold: Hold, sent: Sent) -> RawEmbedded:
        serving = self.serving
        try:
            try:
                embedded = await serving.sent.embed(cast("EmbedRequest", under_way.request), plan, hold, sent)
            finally:
                under_way.last_began(self._reserved_at)
        except BaseException:
            await let_go(serving.embed.settle, hold)
            raise
        await settled(serving.embed, hold, embedded)
        said, headers = embed_reply(embedded, self.run_id)
        await self._x.answer(200, said, headers)
        return embedded
