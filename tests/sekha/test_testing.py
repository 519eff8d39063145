"""The stand-in in a process of its own, as programs in other languages use it."""

import json
import subprocess
import sys
import urllib.request


def test_the_stand_in_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "sekha.testing", "--port", "0", "--dimension", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        urls = dict(process.stdout.readline().split() for _ in range(4))

        sent = json.dumps({"model": "any", "input": ["one", "two"]}).encode()
        request = urllib.request.Request(f"{urls['openai']}/embeddings", sent, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as response:
            reply = json.load(response)
        process.terminate()

    assert [len(item["embedding"]) for item in reply["data"]] == [5, 5]
    assert set(urls) == {"openai", "anthropic", "ollama", "openrouter"}
