"""Where vectors are kept."""

from __future__ import annotations

from typing import Any, Literal

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

__all__ = ["VectorStore"]


class VectorStore(Block):
    """
    Where vectors are kept: one file on this machine, or a Weaviate server.

    Example:
        Load a store that `sekha blocks push` stored:
        ```python
        from blocks import VectorStore

        store = VectorStore.load("BLOCK_NAME")
        ```
    """

    _block_type_name = "Vector Store"
    _block_type_slug = "sekha-vector-store"
    _documentation_url = "https://docs.prefect.io/v3/concepts/blocks"  # type: ignore[assignment]
    _description = "The vector store that Sekha keeps embeddings in: an embedded SQLite file, or Weaviate."

    kind: Literal["embedded", "weaviate"] = Field(default="embedded", description="Which store it is.")
    path: str = Field(default=".sekha/vectors.db", description="Embedded: the file.")
    url: str | None = Field(default=None, description="Weaviate: its HTTP address.")
    grpc_port: int = Field(default=50051, description="Weaviate: its gRPC port.")
    api_key: SecretStr | None = Field(default=None, description="Weaviate: its API key.")
    replication: int = Field(
        default=1, ge=1, description="Weaviate: copies of each object, for collections made from now on."
    )
    consistency: Literal["one", "quorum", "all"] = Field(
        default="quorum", description="Weaviate: how many copies have to answer a read or a write."
    )
    quantizer: Literal["none", "rq-8"] = Field(
        default="none", description="Weaviate: how vectors lie in memory, for collections made from now on."
    )
    query_timeout_secs: float = Field(
        default=15, gt=0, description="Weaviate: seconds for a search or a look, tries included."
    )
    insert_timeout_secs: float = Field(
        default=60, gt=0, description="Weaviate: seconds for one message of writes or deletes."
    )

    def to_section(self) -> dict[str, Any]:
        """This store as `sekha.yaml` would say it, with its key."""
        return {
            "kind": self.kind,
            "path": self.path,
            "url": self.url,
            "grpc_port": self.grpc_port,
            "api_key": self.api_key,
            "replication": self.replication,
            "consistency": self.consistency,
            "quantizer": self.quantizer,
            "query_timeout_secs": self.query_timeout_secs,
            "insert_timeout_secs": self.insert_timeout_secs,
        }
