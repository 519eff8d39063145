"""One retryable step each, typed values in and out: what a flow run shows as its task runs."""
