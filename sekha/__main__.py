"""`sekha` and `python -m sekha`."""

from __future__ import annotations

from sekha import hangup

hangup.hold()  # before the commands are imported, which takes much of a second

from sekha.cli.app import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    main()
