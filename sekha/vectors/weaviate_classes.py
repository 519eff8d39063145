"""Classes in a Weaviate server that we did not make, to be taken over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from sekha.importing import Foreign
from sekha.vectors.origins import Offered, flat, vector_of

__all__ = ["WeaviateClasses"]

TEXT_PROPERTIES = ("text", "content", "document", "body", "chunk")


class WeaviateClasses:
    """Reads classes of any making, objects in the order of their UUIDs."""

    def __init__(
        self,
        client: Any,
        ask: Callable[[Awaitable[Any]], Awaitable[Any]],
        is_ours: Callable[[str, str | None], bool],
        text_property: str | None,
        close: Callable[[], Awaitable[None]],
    ) -> None:
        self._client = client
        self._ask = ask
        self._is_ours = is_ours
        self._text_property = text_property
        self._close = close

    async def offered(self) -> Sequence[Offered]:
        """Those of one tenant each are left out: nobody says which tenant's collection they should become."""
        found = []
        for name, config in sorted((await self._ask(self._client.collections.list_all(simple=False))).items()):
            if not config.multi_tenancy_config.enabled and not self._is_ours(name, config.description):
                counted = await self._ask(self._client.collections.use(name).aggregate.over_all(total_count=True))
                found.append(Offered(name=name, records=int(counted.total_count)))
        return found

    async def page(self, name: str, after: str | None, size: int) -> tuple[list[Foreign], str | None]:
        handle = self._client.collections.use(name)
        answer = await self._ask(handle.query.fetch_objects(limit=size, after=after, include_vector=True))
        found = [self._foreign(each) for each in answer.objects]
        return found, found[-1].id if len(found) == size else None

    async def drop(self, name: str) -> None:
        await self._ask(self._client.collections.delete(name))

    async def aclose(self) -> None:
        await self._close()

    def _foreign(self, found: Any) -> Foreign:
        properties = dict(found.properties)
        names = (self._text_property,) if self._text_property else TEXT_PROPERTIES
        named = next((name for name in names if isinstance(properties.get(name), str)), None)
        text = properties.pop(named) if named else ""
        vectors = found.vector or {}
        # A class with one vector has it under a name too; of several, the one that is called nothing else.
        vector = vectors.get("default") if len(vectors) != 1 else next(iter(vectors.values()))
        return Foreign(id=str(found.uuid), text=text, vector=vector_of(vector), properties=flat(properties))
