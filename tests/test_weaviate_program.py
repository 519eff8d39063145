"""Where the tests' Weaviate server comes from when it is neither installed nor built."""

from __future__ import annotations

import http.server
import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.fixtures.weaviate import downloaded


@pytest.fixture
def releases(tmp_path: Path) -> Iterator[str]:
    """A place like the one that the client downloads from, with one release in it."""
    folder = tmp_path / "releases"
    folder.mkdir()
    program = tmp_path / "weaviate"
    program.write_text("#!/bin/sh\necho a server\n")
    with tarfile.open(folder / "weaviate.tar.gz", "w:gz") as release:
        release.add(program, "weaviate")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_it_is_downloaded_as_the_clients_embedded_mode_does(releases: str, tmp_path: Path) -> None:
    program = downloaded(tmp_path / "half", f"{releases}/weaviate.tar.gz")

    assert isinstance(program, Path), program
    assert os.access(program, os.X_OK)
    assert subprocess.run([program], capture_output=True, check=True).stdout == b"a server\n"


def test_what_cannot_be_downloaded_is_said(releases: str, tmp_path: Path) -> None:
    program = downloaded(tmp_path / "half", f"{releases}/another.tar.gz")

    assert isinstance(program, str)
    assert "could not be downloaded" in program
    assert "404" in program
