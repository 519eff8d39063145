"""Configuration that Prefect stores: providers, the vector store, budgets, and what ties them together."""

from blocks.budget import Budget
from blocks.provider import LLMProvider
from blocks.sekha_config import SekhaConfig, load_config, push
from blocks.store import VectorStore

__all__ = ["Budget", "LLMProvider", "SekhaConfig", "VectorStore", "load_config", "push"]
