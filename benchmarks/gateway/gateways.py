"""The gateways that are compared: how each is installed, configured, started and ended."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import processes
from load import CHAT, EMBEDDING, STREAM, Failed, Target
from upstream import CHAT_MODEL, DIMENSION, EMBEDDING_MODEL, WORDS

from sekha.keys import hash_of, new_key

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sekha"
START_SECONDS = 90.0
END_SECONDS = 10.0
INSTALL_SECONDS = 600.0


class Unavailable(Exception):
    """A gateway cannot be run here, and why."""


@dataclass(frozen=True, slots=True)
class Started:
    """What to run, and how to be let in."""

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Gateway:
    name: str
    prepare: Callable[[str, int, Path], Started]
    """From the provider's address, a port and an empty folder. Raises `Unavailable`."""
    starts: int = 3
    """How many starts are timed."""
    longer: float = 1
    """How much longer its runs take, so that a slow one answers often enough."""


# --- what is compared ------------------------------------------------------------------------


def ours(upstream: str, port: int, folder: Path) -> Started:
    """With every feature on: keys, a budget, circuits, metrics, and one in ten requests recorded into Prefect's tables.

    The process that publishes them runs on the same core.
    """
    key = new_key()
    database = folder / "prefect.db"
    shutil.copy(prefect_database(), database)
    # JSON is YAML.
    config = {
        "providers": [
            {
                "id": "upstream",
                "provider_type": "openai",
                "base_url": f"{upstream}/v1",
                "api_key": "${UPSTREAM_KEY}",
                "models": [
                    {
                        "model_id": CHAT_MODEL,
                        "task": "chat_small",
                        "context_window": 128_000,
                        "max_output_tokens": 16_000,
                        "price": {"input_per_million": 0.25, "output_per_million": 2},
                    },
                    {
                        "model_id": EMBEDDING_MODEL,
                        "task": "embedding",
                        "dimension": DIMENSION,
                        "context_window": 8_192,
                        "price": {"input_per_million": 0.02},
                    },
                ],
            }
        ],
        "budgets": [{"name": "bench", "limit": 1_000_000, "period": "day", "match": {"provider": "upstream"}}],
        "keys": [{"name": "bench", "hash": hash_of(key)}],
        # The rate would otherwise leave out most of a tenth.
        "recording": {"sample": 0.1, "max_per_second": 1_000_000},
        "log_level": "warning",
    }
    file = folder / "sekha.yaml"
    file.write_text(json.dumps(config, indent=2))
    return Started(
        [sys.executable, "-m", "sekha", "serve", "--config", str(file), "--port", str(port)],
        {
            "SEKHA_HOME": str(folder),
            "UPSTREAM_KEY": "none",
            "PREFECT_HOME": str(folder),
            "PREFECT_API_URL": "",
            "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{database}",
        },
        {"authorization": f"Bearer {key}"},
    )


def relay(upstream: str, port: int, _: Path) -> Started:
    server = ["uvicorn", "--app-dir", str(HERE), "--loop", "uvloop", "--http", "httptools", "--no-access-log"]
    return Started(
        [sys.executable, "-m", *server, "--log-level", "warning", "--port", str(port), "relay:app"],
        {"UPSTREAM": upstream},
    )


def smg(upstream: str, port: int, folder: Path) -> Started:
    program = installed("smg", "1.13.0", ["smg==1.13.0"])
    return Started(
        [
            *(str(program / "smg"), "launch", "--host", "127.0.0.1", "--port", str(port)),
            *("--backend", "openai", "--worker-urls", upstream, "--policy", "round_robin"),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
            *("--history-backend", "none", "--log-level", "warn", "--log-dir", str(folder)),
        ]
    )


def litellm(upstream: str, port: int, folder: Path) -> Started:
    """As it is fastest: with OpenTelemetry, which it else tries to import at each request.

    It refuses to start without a master key, so it has one, and no database.
    """
    program = installed("litellm", "1.106.2", ["litellm[proxy]==1.106.2", "opentelemetry-sdk"])
    config = {
        "model_list": [
            {
                "model_name": name,
                "litellm_params": {"model": f"openai/{name}", "api_base": f"{upstream}/v1", "api_key": "none"},
            }
            for name in (CHAT_MODEL, EMBEDDING_MODEL)
        ]
    }
    key = f"sk-{secrets.token_hex(32)}"
    file = folder / "litellm.yaml"
    file.write_text(json.dumps(config, indent=2))
    return Started(
        [
            *(str(program / "litellm"), "--config", str(file)),
            *("--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"),
        ],
        {
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_LOG": "ERROR",
            "LITELLM_MASTER_KEY": key,
            "LITELLM_MODE": "PRODUCTION",
        },
        {"authorization": f"Bearer {key}"},
    )


GATEWAYS = {
    each.name: each
    for each in (
        Gateway("ours", ours),
        Gateway("smg", smg),
        Gateway("relay", relay),
        Gateway("litellm", litellm, starts=1, longer=4),
    )
}


# --- installing ------------------------------------------------------------------------------


def installed(name: str, version: str, requirements: Sequence[str]) -> Path:
    """The folder of programs of an environment of its own, made once."""
    environment = CACHE / f"bench-{name}-{version}"
    programs = environment / "bin"
    ready = environment / "ready"
    if not ready.exists():
        print(f"installing {name} {version} into {environment} …", file=sys.stderr)
        environment.parent.mkdir(parents=True, exist_ok=True)
        uv = [sys.executable, "-m", "uv"]
        run([*uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(environment)])
        run([*uv, "pip", "install", "--quiet", "--python", str(programs / "python"), *requirements])
        ready.touch()
    return programs


def prefect_database() -> Path:
    """Prefect's tables with nothing in them, made once."""
    database = CACHE / f"bench-prefect-{version('prefect')}.db"
    if not database.exists():
        print(f"making {database} …", file=sys.stderr)
        database.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=database.parent) as folder:
            made = Path(folder) / "prefect.db"
            upgrade = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
            url = f"sqlite+aiosqlite:///{made}"
            run(upgrade, {"PREFECT_HOME": folder, "PREFECT_API_URL": "", "PREFECT_API_DATABASE_CONNECTION_URL": url})
            made.rename(database)
    return database


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    try:
        ended = subprocess.run(
            command,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(str(error)) from error
    if ended.returncode:
        last = ended.stderr.strip().splitlines() or ["it said nothing"]
        raise Unavailable(f"`{' '.join(command[1:])}` ended with {ended.returncode}: {last[-1]}")
    return ended.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- running ---------------------------------------------------------------------------------


class Running:
    """One gateway on one core, from its start to its end.

    >>> with Running(GATEWAYS["smg"], upstream, folder, core=0) as smg:
    ...     smg.seconds_to_first_answer
    """

    def __init__(
        self, gateway: Gateway, upstream: str, folder: Path, *, core: int, environment: Mapping[str, str] | None = None
    ) -> None:
        port = free_port()
        folder.mkdir(parents=True)
        started = gateway.prepare(upstream, port, folder)
        self.gateway = gateway
        self.target = Target(port, started.headers)
        self._command = started.command
        self._environment = {**inherited(), **started.environment, **(environment or {})}
        self._folder = folder
        self._core = core

    def __enter__(self) -> Running:
        began = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=processes.pinned(self._core),  # noqa: PLW1509 - there are no threads yet
            )
        try:
            self._wait_for_an_answer(began + START_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        self.seconds_to_first_answer = time.perf_counter() - began
        return self

    def __exit__(self, *_: object) -> None:
        pids = self.pids
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    @property
    def pids(self) -> set[int]:
        return processes.tree(self._process.pid)

    @property
    def serving(self) -> set[int]:
        return processes.serving(self._process.pid, self.target.port)

    @property
    def serving_with_parents(self) -> set[int]:
        return processes.with_parents(self.serving, self._process.pid)

    @property
    def last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])

    @property
    def _log(self) -> Path:
        return self._folder / "output.log"

    def _wait_for_an_answer(self, until: float) -> None:
        while True:
            why = "no connection"
            with suppress(OSError, http.client.HTTPException):
                status, body = ask(self.target, "/chat/completions", CHAT)
                if status == 200:
                    return
                why = f"status {status}: {body[:300]!r}"
            if self._process.poll() is not None:
                raise Unavailable(f"it ended with {self._process.returncode}:\n{self.last_words}")
            if time.perf_counter() > until:
                raise Unavailable(f"no answer within {START_SECONDS:g} s ({why}):\n{self.last_words}")
            time.sleep(0.005)


def inherited() -> dict[str, str]:
    """Our environment, without what would have Python compile at each start or talk through a proxy."""
    left_out = {"PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
    kept = {name: value for name, value in os.environ.items() if name.upper() not in left_out}
    return {**kept, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def ask(target: Target, path: str, body: object) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=30)
    try:
        headers = {"content-type": "application/json", **target.headers}
        connection.request("POST", f"/v1{path}", json.dumps(body), headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def recorded(target: Target) -> float:
    """How many requests ours says that it has recorded."""
    return _metric(target, "sekha_recorder_recorded_total")


def queued(target: Target) -> float:
    """Bytes of recorded requests that ours has yet to publish."""
    return _metric(target, "sekha_recorder_queue_bytes")


def _metric(target: Target, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=30)
    try:
        connection.request("GET", "/metrics", headers=dict(target.headers))
        lines = connection.getresponse().read().decode().splitlines()
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"ours does not tell its metrics: {error!r}") from error
    finally:
        connection.close()
    return sum(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def embeds(target: Target) -> bool:
    """Ask for one of everything, and look closely. Raises `Failed`; tells whether there are embeddings."""
    status, body = ask(target, "/chat/completions", CHAT)
    reply = json.loads(body)
    if status != 200 or reply["choices"][0]["message"]["content"].strip() != "".join(WORDS).strip():
        raise Failed(f"chat: status {status}, {body[:500]!r}")
    if not reply["usage"]["completion_tokens"]:
        raise Failed(f"chat: no usage in {body[:500]!r}")
    status, body = ask(target, "/chat/completions", STREAM)
    events = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
    pieces = [
        content
        for event in events[:-1]
        for choice in json.loads(event)["choices"]
        if (content := choice["delta"].get("content"))
    ]
    if pieces != WORDS or events[-1] != "[DONE]":
        raise Failed(f"stream: status {status}, {body[:500]!r}")
    status, body = ask(target, "/embeddings", EMBEDDING)
    if status in (404, 405, 501):
        return False
    if status != 200 or len(json.loads(body)["data"][0]["embedding"]) != DIMENSION:
        raise Failed(f"embeddings: status {status}, {body[:500]!r}")
    return True
