"""HTTP in front of it all: OpenAI's API for every provider, and what an operator asks of it."""
