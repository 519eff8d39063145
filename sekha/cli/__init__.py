"""The command line. It puts every layer together, so it alone may import them all, and only inside commands."""
