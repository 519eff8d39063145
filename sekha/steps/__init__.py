"""The steps of every flow as plain callables. Each does one thing with the open resources."""
