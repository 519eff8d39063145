"""OpenAI's SDK for Node against the gateway, unchanged but for its `baseURL`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from sekha.testing import StandIn
from tests.fixtures.gateway import Opens
from tests.fixtures.missing import missing
from tests.fixtures.upstream import Upstream, anthropic_stream

# The last that runs on Node 20; 7 asks for 22.
VERSION = "6.30.1"
INTEGRITY = "sha512-5bkK9GoQMd8j4a0TeY95AIC7FtGP38HlfO+YvRq4TkEndHLI1iR8ct9wajmsAMw+G/QcPOZnqzhhsUT2GKUWkA=="

PROGRAM = """
import OpenAI from "openai";

const client = new OpenAI({ apiKey: "nobody's", baseURL: process.env.BASE_URL, maxRetries: 0 });
const messages = [{ role: "user", content: "Hello there." }];
const said = {};

const { data: chat, response } = await client.chat.completions.create({ model: "chat", messages }).withResponse();
said.chat = chat.choices[0].message.content;
said.sekha = chat.sekha;
said.cost = response.headers.get("x-sekha-cost");
said.requestId = chat._request_id;

said.pieces = [];
const stream = await client.chat.completions.create({
  model: "chat", messages, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  if (chunk.choices[0]?.delta?.content) said.pieces.push(chunk.choices[0].delta.content);
  if (chunk.usage) said.usage = chunk.usage.completion_tokens;
}

const summed = client.chat.completions.stream({ model: "chat", messages, stream_options: { include_usage: true } });
const whole = await summed.finalChatCompletion();
said.summed = [whole.choices[0].message.content, whole.usage.completion_tokens];

const thought = await client.chat.completions.stream({
  model: "claude-sonnet-4-5", messages, reasoning_effort: "low",
}).finalChatCompletion();
said.thought = thought.choices[0].message.thinking_blocks;

const embedded = await client.embeddings.create({ model: "vectors", input: ["one", "two"] });
said.lengths = embedded.data.map((item) => item.embedding.length);

said.models = [];
for await (const model of client.models.list()) said.models.push(model.id);
said.model = (await client.models.retrieve("first/chat")).id;

const caught = async (work) => {
  try { await work(); return null; } catch (error) {
    return [error.constructor.name, error.status ?? null, error.code ?? null];
  }
};
said.unknown = await caught(() => client.chat.completions.create({ model: "chatt", messages }));
said.malformed = await caught(() => client.chat.completions.create({ model: "chat", messages: "Hello" }));
said.broken = await caught(async () => {
  const cut = await client.chat.completions.create({ model: "breaks/chat", messages, stream: true });
  for await (const chunk of cut) said.last = chunk.choices[0]?.delta?.content;
});

const patient = new OpenAI({ apiKey: "nobody's", baseURL: process.env.BASE_URL, maxRetries: 2 });
said.limited = await caught(() => patient.chat.completions.create({ model: "limits/chat", messages }));
console.log(JSON.stringify(said));
"""

CONFIG = """
providers:
  - {{id: first, provider_type: openai, base_url: {first}, models: [{chat}, {vectors}]}}
  - {{id: breaks, provider_type: openai, base_url: {breaks}, priority: 60, models: [{chat}]}}
  - {{id: limits, provider_type: openai, base_url: {limits}, priority: 60, models: [{chat}]}}
  - {{id: thinks, provider_type: anthropic, base_url: {thinks}, models: [{claude}]}}
budgets: [{{name: all, limit: 1000}}]
"""
THOUGHT = anthropic_stream(
    [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": "Let me "},
        {"type": "thinking_delta", "thinking": "see."},
        {"type": "signature_delta", "signature": "signed"},
    ],
    [{"type": "redacted_thinking", "data": "AAAA"}],
    [{"type": "text", "text": ""}, {"type": "text_delta", "text": "Hi."}],
)


@pytest.fixture(scope="module")
def sdk() -> Path:
    """The folder of the SDK, fetched once on this machine and kept outside of the repository."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        missing("no Node: install it, with npm, for the SDK that programs in JavaScript use")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sekha"
    folder = cache / f"node-openai-{VERSION}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="node-") as unfinished:
            flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--omit=peer", "--save-exact"]
            command = [npm, "install", "--prefix", unfinished, *flags, f"openai@{VERSION}"]
            if subprocess.run(command, check=False, capture_output=True, timeout=100).returncode:
                missing(f"openai {VERSION} is to be had from no npm registry")
            # Whole or not there at all, whoever else fetches it meanwhile.
            with contextlib.suppress(OSError):
                Path(unfinished).rename(folder)
            Path(unfinished).mkdir(exist_ok=True)
    lock = json.loads((folder / "package-lock.json").read_text())
    assert lock["packages"]["node_modules/openai"]["integrity"] == INTEGRITY
    return folder


async def test_the_node_sdk_works_as_it_does_with_openai(gateway: Opens, sdk: Path) -> None:
    async with (
        StandIn(dimension=8) as first,
        StandIn() as breaks,
        StandIn() as limits,
        Upstream(THOUGHT) as thinks,
    ):
        breaks.cut(after=3, times=None)
        limits.fail(429, retry_after="0.02", times=None)
        config = CONFIG.format(
            first=first.openai_url,
            breaks=breaks.openai_url,
            limits=limits.openai_url,
            thinks=thinks.url,
            chat="{model_id: chat, task: chat_small, price: {input_per_million: 1000, output_per_million: 2000}}",
            claude="{model_id: claude-sonnet-4-5, task: chat_smart, price: free}",
            vectors="{model_id: vectors, task: embedding, dimension: 8, price: free}",
        )
        async with gateway(config=config) as served:
            said = await _run(sdk, served.v1)
            held = await served.held()

    assert said["chat"] == "You said: Hello there."
    assert said["sekha"]["provider_id"] == "first"
    assert float(said["cost"]) == said["sekha"]["cost"] == 0.01
    assert said["requestId"]
    assert "".join(said["pieces"]) == "You said: Hello there."
    assert said["usage"] == 4
    assert said["summed"] == ["You said: Hello there.", 4]
    assert said["thought"] == [
        {"type": "thinking", "thinking": "Let me see.", "signature": "signed"},
        {"type": "redacted_thinking", "data": "AAAA"},
    ]
    assert said["lengths"] == [8, 8]
    assert {"chat", "vectors", "first/chat"} <= set(said["models"])
    assert said["model"] == "first/chat"
    assert said["unknown"] == ["NotFoundError", 404, "model_not_found"]
    assert said["malformed"] == ["BadRequestError", 400, "invalid_request"]
    assert said["broken"] == ["APIError", None, "stream_broken"]
    assert said["last"] == " said:"
    assert said["limited"] == ["RateLimitError", 429, "rate_limited"]
    assert len(limits.requests) == 3
    assert held == 0


async def _run(sdk: Path, base_url: str) -> dict[str, Any]:
    environment = {"PATH": os.environ["PATH"], "BASE_URL": base_url}
    program = await asyncio.create_subprocess_exec(
        "node",
        "--input-type=module",
        "-",
        cwd=sdk,
        env=environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, complaints = await program.communicate(PROGRAM.encode())
    assert program.returncode == 0, complaints.decode()
    said: dict[str, Any] = json.loads(out)
    return said
