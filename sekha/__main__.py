"""`sekha` and `python -m sekha`."""

from __future__ import annotations

from sekha.cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
