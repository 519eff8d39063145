"""Sekha: one place through which programs reach every LLM provider and keep what they embed."""
