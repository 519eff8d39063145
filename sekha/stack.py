"""A Prefect server, a worker and the gateway on this machine, started and ended by us, and our deployments there."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TextIO
from urllib.parse import SplitResult, urlsplit

from sekha.address import without_secrets
from sekha.errors import PrefectUnavailable, RecordError
from sekha.loading import find

__all__ = ["POOL", "LocalPrefect", "Progress", "deploy", "deployment_file", "require_server"]

POOL = "sekha"
HOST = "127.0.0.1"
PACKAGE = Path(__file__).parent

Progress = Callable[[str], None]
"""Told in a few words what is being waited for, each time that changes."""

# A task run's state is one event each, and without batches SQLite commits every one of them, in the
# way of the flow's own writes.
SETTINGS: Mapping[str, str] = {
    "DO_NOT_TRACK": "1",
    "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "false",
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "sekha",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "2",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "200",
    "PREFECT_WORKER_QUERY_SECONDS": "2",
}
INHERITED = ("PREFECT_LOGGING_", "PREFECT_UI_")
"""Of the caller's own Prefect settings, those that lead to no other server."""


def _quiet(_: str) -> None:
    pass


class LocalPrefect:
    """A Prefect server on loopback that lives as long as the `async with` block, and no longer.

    >>> async with LocalPrefect(Path(".sekha/prefect")) as prefect:
    ...     await prefect.worker()
    ...     await deploy(prefect.environment)

    All that it keeps is under `home`, where the next start finds it; one server at a time runs there.
    It also ends when this process is killed. Raises `PrefectUnavailable`.
    """

    def __init__(
        self, home: Path, *, port: int | None = None, progress: Progress = _quiet, timeout_seconds: float = 90.0
    ) -> None:
        self.home = home.expanduser().resolve()
        self.port = port
        self._progress = progress
        self._timeout_seconds = timeout_seconds
        self._running = contextlib.AsyncExitStack()
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def ui_url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def api_url(self) -> str:
        return f"{self.ui_url}/api"

    @property
    def environment(self) -> dict[str, str]:
        """The settings with which a program uses this server. Set them before it imports Prefect."""
        return {**SETTINGS, "PREFECT_HOME": str(self.home), "PREFECT_API_URL": self.api_url}

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as starting:
            await self._start(starting)
            self._running = starting.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._running.aclose()

    async def worker(self, pool: str = POOL) -> None:
        """Start a worker and wait until it polls. Its runs read the configuration that this process would."""
        self._progress(f"starting a worker for the work pool {pool!r}")
        started = datetime.now(UTC)
        command = ["worker", "start", "--pool", pool, "--type", "process", "--name", "local"]
        environment = {**self.environment, **_configuration(os.environ)}
        worker = await self._running.enter_async_context(_child(command, environment, self.home / "worker.log"))

        async def polls() -> bool:
            workers = await _get(self.api_url, f"/work_pools/{pool}/workers/filter", {})
            return any(datetime.fromisoformat(each["last_heartbeat_time"]) > started for each in workers or ())

        await self._until(polls, worker, "worker")
        self._children["worker"] = worker

    async def gateway(self, host: str, port: int) -> str:
        """Start the gateway on the configuration that this process would read, and wait until it answers.

        It records into this server. Returns where programs reach it; port 0 is a free one.
        """
        self._progress("starting the gateway")
        if not port:
            port = _free_port()
        elif _in_use(port):
            raise PrefectUnavailable(
                f"Port {port} of {HOST} is in use, and the gateway is to listen there: name another with "
                "`--gateway-port` or `server_port:`, or 0 for any free one."
            )
        command = ["serve", "--host", host, "--port", str(port)]
        environment = {**self.environment, **_configuration(os.environ)}
        gateway = await self._running.enter_async_context(
            _child(command, environment, self.home / "gateway.log", module="sekha")
        )
        reached = HOST if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not listened on
        url = f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"

        async def answers() -> bool:
            return bool(await _get(url, "/health/live"))

        await self._until(answers, gateway, "gateway")
        self._children["gateway"] = gateway
        return url

    def reload_gateway(self) -> None:
        """Have the gateway read its configuration anew."""
        self._children["gateway"].send_signal(signal.SIGHUP)

    async def watch(self) -> NoReturn:
        """Wait for as long as all that was started runs; raise `PrefectUnavailable` when one ends by itself."""
        while True:
            for what, child in self._children.items():
                if child.poll() is not None:
                    raise PrefectUnavailable(f"{_named(what)} ended by itself. {_tail(self.home / f'{what}.log')}")
            await asyncio.sleep(0.5)

    async def _start(self, starting: contextlib.AsyncExitStack) -> None:
        # For its owner alone: prompts and answers lie in there, as parameters and results.
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = starting.enter_context((self.home / "owner.json").open("a+", encoding="utf-8"))
        await self._own(owner)
        if self.port is None:
            self.port = _free_port()
        elif _in_use(self.port):
            raise PrefectUnavailable(
                f"Port {self.port} of {HOST} is in use: name another with `--port`, or 0 for any free one."
            )
        owner.truncate(0)
        json.dump({"pid": os.getpid(), "url": self.ui_url}, owner)
        owner.flush()

        environment = {
            **self.environment,
            **self._encryption_key(),
            "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false",
        }
        await self._migrate(environment, owner)
        self._progress("starting Prefect's server")
        command = ["server", "start", "--host", HOST, "--port", str(self.port)]
        log = self.home / "server.log"
        server = await starting.enter_async_context(_child(command, environment, log, keeps_open=owner))

        async def ready() -> bool:
            return bool(await _get(self.api_url, "/ready"))

        await self._until(ready, server, "server")
        self._children["server"] = server

    async def _own(self, owner: TextIO) -> None:
        """Wait for a server whose parent was killed to be gone, and refuse to run beside a living one's."""
        ends_at = time.monotonic() + self._timeout_seconds
        told = False
        while not _locked(owner):
            owner.seek(0)
            with contextlib.suppress(ValueError):
                other = json.load(owner)
                if _alive(other["pid"]):
                    raise PrefectUnavailable(
                        f"A Prefect server runs on {self.home} already, started by process {other['pid']}: use "
                        f"it with PREFECT_API_URL={other['url']}/api, or end that process first."
                    )
            if time.monotonic() > ends_at:
                raise PrefectUnavailable(f"The last Prefect server on {self.home} does not end: look for its process.")
            if not told:
                self._progress("waiting for the last server to end")
                told = True
            await asyncio.sleep(0.1)

    async def _migrate(self, environment: Mapping[str, str], owner: TextIO) -> None:
        """Bring the database to this Prefect's tables.

        Before the server starts, since its services write from the first second on and would find the
        database locked.
        """
        done = self.home / "migrated"
        database = self.home / "prefect.db"
        # The database itself is asked too: it may have been deleted since, or be an older one that was restored.
        if done.exists() and done.read_text(encoding="utf-8") == f"{version('prefect')} {_revision(database)}":
            return
        self._progress("preparing Prefect's database")
        log = self.home / "database.log"
        command = ["server", "database", "upgrade", "-y"]
        async with _child(command, environment, log, keeps_open=owner) as upgrade:

            async def ended() -> bool:
                return upgrade.poll() == 0

            await self._until(ended, upgrade, "database")
        done.write_text(f"{version('prefect')} {_revision(database)}", encoding="utf-8")

    def _encryption_key(self) -> dict[str, str]:
        """The key of the secrets in blocks, kept beside the database: by itself Prefect keeps it in there."""
        file = self.home / "encryption.key"
        if not file.exists():
            if (self.home / "prefect.db").exists():
                return {}
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as new:
                new.write(base64.urlsafe_b64encode(secrets.token_bytes(32)))
        return {"PREFECT_SERVER_ENCRYPTION_KEY": file.read_text(encoding="ascii")}

    async def _until(self, done: Callable[[], Awaitable[bool]], child: subprocess.Popen[bytes], what: str) -> None:
        ends_at = time.monotonic() + self._timeout_seconds
        while not await done():
            log = self.home / f"{what}.log"
            if child.poll():
                raise PrefectUnavailable(f"{_named(what)} ended before it was ready. {_tail(log)}")
            if time.monotonic() > ends_at:
                raise PrefectUnavailable(
                    f"{_named(what)} was not ready within {self._timeout_seconds:g} s. {_tail(log)}"
                )
            await asyncio.sleep(0.1)


def _revision(database: Path) -> str:
    """The revision of a database's tables; `none` where it has none, or cannot be read."""
    try:
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error:
        return "none"
    return str(row[0]) if row else "none"


async def require_server(api_url: str | None) -> None:
    """Raise `PrefectUnavailable`, within seconds, unless a Prefect server answers there."""
    if not api_url:
        raise PrefectUnavailable("No Prefect server is named: start one with `sekha up`, or set PREFECT_API_URL.")
    if await _get(api_url, "/health") is None:
        raise PrefectUnavailable(
            f"No Prefect server answers at {without_secrets(api_url)}: start one with `sekha up`, or correct "
            "PREFECT_API_URL."
        )


async def deploy(environment: Mapping[str, str], *, pool: str = POOL) -> None:
    """Register the deployments, and the work pool that they run in; what is there already is updated.

    `environment` names the server, as `LocalPrefect.environment` does. Raises `PrefectUnavailable` when
    none answers there, and `RecordError` with Prefect's own words when it refuses.
    """
    api_url = environment.get("PREFECT_API_URL", "")
    await require_server(api_url)
    # Asking costs nothing, and Prefect's command seconds. A server that wants a login answers neither way.
    if not await _get(api_url, f"/work_pools/{pool}"):
        create = ["--no-prompt", "work-pool", "create", pool, "--type", "process"]
        if problem := await _refusal(create, environment, unless="already exists"):
            raise RecordError(f"Prefect did not create the work pool {pool!r}. {problem}")
    register = ["--no-prompt", "deploy", "--all", "--prefect-file", str(deployment_file("prefect.yaml"))]
    if problem := await _refusal(register, environment):
        raise RecordError(f"Prefect did not take the deployments. {problem}")


def deployment_file(name: str) -> Path:
    """A file of `deployments/` in a checkout; a wheel carries it inside the package."""
    inside = PACKAGE / "deployments" / name
    return inside if inside.exists() else PACKAGE.parent / "deployments" / name


async def _refusal(command: Sequence[str], environment: Mapping[str, str], *, unless: str | None = None) -> str | None:
    """Run a Prefect command to its end; what it said if it failed."""
    with tempfile.TemporaryDirectory(prefix="sekha-") as folder:
        log = Path(folder, "log")
        async with _child(command, environment, log) as child:
            code = await asyncio.to_thread(child.wait)
        said = _tail(log)
        return None if code == 0 or (unless and unless in said) else said


@contextlib.asynccontextmanager
async def _child(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    *,
    keeps_open: TextIO | None = None,
    module: str = "prefect",
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """Run a command of Prefect's, or ours, until the block ends, or this process does."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONDONTWRITEBYTECODE" and (not name.startswith("PREFECT_") or name.startswith(INHERITED))
    }
    with log.open("wb") as output:
        child = subprocess.Popen(  # noqa: ASYNC220, S603 - returns at once; the command line is ours
            [sys.executable, "-I", str(PACKAGE / "tether.py"), sys.executable, "-m", module, *command],
            env={**inherited, **environment, **_import_path()},
            # Python looks for modules where it is started, and `types/` or `trace.py` there would be found.
            cwd=log.parent,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[keeps_open.fileno()] if keeps_open else [],
        )
    try:
        yield child
    finally:
        if child.stdin:
            child.stdin.close()
        await asyncio.to_thread(child.wait)


def _import_path() -> dict[str, str]:
    """What makes `flows` importable from anywhere: a checkout's root; an installed wheel needs nothing."""
    root = PACKAGE.parent
    if not (root / "pyproject.toml").exists():
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}


def _configuration(environ: Mapping[str, str]) -> dict[str, str]:
    """Where a flow run, which works in a folder of its own, finds what would be found from here, by the same link."""
    if environ.get("SEKHA_CONFIG", "").startswith("block:"):
        return {}
    file = find(None, environ)
    return (
        {"SEKHA_CONFIG": str(file.absolute())} if file else {"SEKHA_HOME": environ.get("SEKHA_HOME") or str(Path.cwd())}
    )


async def _get(api_url: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """What the server answers, False for anything that is not JSON, None when nobody answers."""
    return await asyncio.to_thread(_ask, urlsplit(api_url + path), None if body is None else json.dumps(body))


def _ask(url: SplitResult, body: str | None) -> Any:
    kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
    connection = kind(url.hostname or "", url.port, timeout=3)
    try:
        connection.request("GET" if body is None else "POST", url.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        return json.loads(content) if response.status == 200 else False
    except ValueError:
        return False
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()


def _named(what: str) -> str:
    return "The gateway" if what == "gateway" else f"Prefect's {what}"


def _locked(owner: TextIO) -> bool:
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def _in_use(port: int) -> bool:
    with socket.socket() as wanted:
        wanted.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            wanted.bind((HOST, port))
        except OSError:
            return True
    return False


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join(["It said:", *lines[-15:]]) if lines else "It said nothing."
