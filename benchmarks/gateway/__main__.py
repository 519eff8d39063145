"""What a gateway costs: ours beside smg and LiteLLM's proxy, and beside the least that Python can do.

    python benchmarks/gateway                     everything, about a quarter of an hour
    python benchmarks/gateway --quick             shorter runs: noisier, for a look
    python benchmarks/gateway --only ours,smg     some of ours, relay, smg, litellm
    python benchmarks/gateway --profile ours.svg  where our time goes, with py-spy from the PATH

Each gateway runs on one core; the other has the provider, which answers at once, and the load. A request is
asked directly and through the gateway in turns, and what a gateway adds is the difference. Gateways take
turns as well, and a ratio is the median over the rounds, so that a neighbour slows both sides of it. A turn
begins once ours has published what it recorded in its last one; with one connection, what is asked directly
does too. What one connection waits for depends most on the machine's mood, so those turns are short and many,
and it is said between what the median of all such turns lies.

- ours: `sekha serve` with a key, a budget, circuits, metrics, and one in ten requests recorded
- relay: bare ASGI on uvicorn (uvloop, httptools) and aiohttp, request and reply parsed; no features
- smg 1.13.0 and litellm[proxy] 1.106.2: from PyPI, each in an environment in the user's cache, made once.
  One that cannot be installed is named, and its figures of elsewhere are shown as not measured

Exits with 1 when a bound is missed or ours does not run. Needs Linux and two cores that are otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import bounds
import processes
import uvloop
from bounds import Figures, judge
from gateways import GATEWAYS, HERE, Gateway, Running, Unavailable, ask, embeds, queued, recorded
from load import CHAT, EMBEDDING, STREAM, Asking, Connection, Failed, Sample, Streaming, Target, load
from upstream import WORDS

AT_ONCE = 16
HEAVY = ("litellm", "prefect")
SETTLING_SECONDS = 5.0
"""Until whatever a gateway starts beside itself is up, which for ours is the process that publishes what it records."""
PUBLISHED_SECONDS = 60.0
SHOWN = (
    bounds.CHATS,
    "chats: p50, ms",
    "chats: p99, ms",
    "chats: CPU µs each",
    bounds.CHUNKS,
    "chunks: CPU µs each",
    bounds.EMBEDDINGS,
    bounds.ADDED_P50,
    bounds.ADDED_P99,
    bounds.ADDED_FIRST,
    bounds.START,
    bounds.IDLE,
    "idle RSS, MB",
    "PSS after, MB",
    "PSS of all its processes after, MB",
)


@dataclass(frozen=True, slots=True)
class Bench:
    """What all runs of one benchmark share."""

    upstream: Target
    folder: Path
    core: int
    seconds: float

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.upstream.port}"

    def run(self, target: Target, path: str, body: object, connections: int, kind: Connection = Asking) -> Sample:
        return uvloop.run(load(target, path, body, connections=connections, seconds=self.seconds, kind=kind))

    def chats(self, target: Target, connections: int) -> Sample:
        return self.run(target, "/chat/completions", CHAT, connections)

    def streams(self, target: Target, connections: int) -> Sample:
        return self.run(target, "/chat/completions", STREAM, connections, Streaming)

    def embeddings(self, target: Target) -> Sample:
        return self.run(target, "/embeddings", EMBEDDING, AT_ONCE)


# --- what is measured ------------------------------------------------------------------------


def start(bench: Bench, gateway: Gateway, figures: Figures, starts: int, stack: ExitStack) -> Running:
    """Time so many starts, behind one that writes the byte code, and leave the last one running."""
    for number in range(starts):
        with Running(gateway, bench.address, bench.folder / f"{gateway.name}-{number}", core=bench.core) as running:
            if number:
                figures.note(bounds.START, running.seconds_to_first_answer)
    last = Running(gateway, bench.address, bench.folder / f"{gateway.name}-last", core=bench.core)
    running = stack.enter_context(last)
    if gateway.name == "ours" and ask(Target(running.target.port, {}), "/chat/completions", CHAT)[0] != 401:
        raise Failed("ours answers a caller without a key: it is not measured as it was meant to be")
    figures.note(bounds.START, running.seconds_to_first_answer)
    time.sleep(SETTLING_SECONDS)
    idle = processes.memory(running.serving)
    figures.note(bounds.IDLE, idle["pss"])
    figures.note("idle RSS, MB", idle["rss"])
    return running


def imports(bench: Bench, gateway: Gateway) -> list[str]:
    """The heavy packages in a serving process that has answered one of everything."""
    notes = bench.folder / f"{gateway.name}-imports"
    watching = {"PYTHONPATH": str(HERE / "watching"), "IMPORTS_NOTED_IN": str(notes)}
    folder = bench.folder / f"{gateway.name}-watched"
    with Running(gateway, bench.address, folder, core=bench.core, environment=watching) as running:
        embeds(running.target)
        serving, related = running.serving, running.serving_with_parents
    noted = [line.split(" ") for line in notes.read_text("utf-8").splitlines()]
    if not serving or not serving <= {int(pid) for pid, _ in noted}:
        raise Failed("the serving process did not say what it imports")
    modules = {module.partition(".")[0] for pid, module in noted if int(pid) in related}
    return [name for name in HEAVY if name in modules]


def measure_one(bench: Bench, running: Running, figures: Figures) -> None:
    """One turn with one connection."""
    target = running.target
    longer = replace(bench, seconds=bench.seconds * running.gateway.longer)
    straight, through = bench.chats(bench.upstream, 1), longer.chats(target, 1)
    figures.note(bounds.ADDED_P50, through.p50 - straight.p50)
    figures.note(bounds.ADDED_P99, through.p99 - straight.p99)
    if running.gateway.name == "ours":
        rest(running)
    straight, through = bench.streams(bench.upstream, 1), longer.streams(target, 1)
    figures.note(bounds.ADDED_FIRST, through.first_p50 - straight.first_p50)


def measure_many(bench: Bench, running: Running, figures: Figures, direct: Figures, *, with_embeddings: bool) -> None:
    """One turn with many connections."""
    target = running.target
    longer = replace(bench, seconds=bench.seconds * running.gateway.longer)
    before = processes.cpu_seconds(running.pids)
    chats = longer.chats(target, AT_ONCE)
    between = processes.cpu_seconds(running.pids)
    streams = longer.streams(target, AT_ONCE)
    after = processes.cpu_seconds(running.pids)
    figures.note(bounds.CHATS, chats.per_second)
    figures.note("chats: p50, ms", chats.p50)
    figures.note("chats: p99, ms", chats.p99)
    figures.note("chats: CPU µs each", (between - before) / chats.answers * 1e6)
    figures.note(bounds.CHUNKS, streams.per_second * len(WORDS))
    figures.note("chunks: CPU µs each", (after - between) / (streams.answers * len(WORDS)) * 1e6)
    if with_embeddings:
        figures.note(bounds.EMBEDDINGS, longer.embeddings(target).per_second)

    straight = bench.chats(bench.upstream, AT_ONCE)
    direct.note(bounds.CHATS, straight.per_second)
    direct.note("chats: p50, ms", straight.p50)
    direct.note("chats: p99, ms", straight.p99)
    direct.note(bounds.CHUNKS, bench.streams(bench.upstream, AT_ONCE).per_second * len(WORDS))


def rest(ours: Running) -> None:
    """Wait until ours has published what it recorded in its last turn: that would slow whoever is next on its core."""
    until = time.monotonic() + PUBLISHED_SECONDS
    while queued(ours.target):
        if time.monotonic() > until:
            raise Failed(f"ours has not published what it recorded after {PUBLISHED_SECONDS:.0f} s")
        time.sleep(0.1)


def in_turns(running: Mapping[str, Running], rounds: int, what: str, measure: Callable[[Running], None]) -> None:
    for number in range(rounds):
        for name, each in list(running.items())[:: -1 if number % 2 else 1]:
            say(f"{what}, round {number + 1} of {rounds}: {name}")
            try:
                if "ours" in running:
                    rest(running["ours"])
                measure(each)
            except Failed as error:
                raise Failed(f"{name}: {error}\n{each.last_words}") from error


def compare(
    bench: Bench, wanted: Sequence[Gateway], *, rounds: int, rounds_of_one: int, quick: bool
) -> dict[str, Figures]:
    figures = {name: Figures() for name in ("direct", *(gateway.name for gateway in wanted))}
    with ExitStack() as stack:
        running: dict[str, Running] = {}
        for gateway in wanted:
            say(f"starting {gateway.name}")
            try:
                if gateway.name == "ours":
                    figures[gateway.name].imports = imports(bench, gateway)
                starts = 1 if quick else gateway.starts
                running[gateway.name] = start(bench, gateway, figures[gateway.name], starts, stack)
            except Unavailable as error:
                figures[gateway.name].unavailable = str(error)
        with_embeddings = {name: embeds(each.target) for name, each in running.items()}

        def measure(each: Running) -> None:
            name = each.gateway.name
            measure_many(bench, each, figures[name], figures["direct"], with_embeddings=with_embeddings[name])

        in_turns(running, rounds, "many connections", measure)
        # Nothing is promised of a slow one that it would take more rounds to see.
        slow = {name: each for name, each in running.items() if each.gateway.longer > 1}
        quick_ones = {name: each for name, each in running.items() if name not in slow}
        shorter = replace(bench, seconds=bench.seconds / 3)
        for some, times in ((quick_ones, rounds_of_one), (slow, rounds)):
            in_turns(some, times, "one connection", lambda each: measure_one(shorter, each, figures[each.gateway.name]))
        if "ours" in running and not recorded(running["ours"].target):
            raise Failed("ours records nothing: it is not measured as it was meant to be")
        for name, each in running.items():
            figures[name].note("PSS after, MB", processes.memory(each.serving)["pss"])
            figures[name].note("PSS of all its processes after, MB", processes.memory(each.pids)["pss"])
    return figures


def profile(bench: Bench, into: Path) -> int:
    """Sample our serving process under load."""
    if (py_spy := shutil.which("py-spy")) is None:
        print("py-spy is not on the PATH: pip install py-spy", file=sys.stderr)
        return 1
    with Running(GATEWAYS["ours"], bench.address, bench.folder / "profiled", core=bench.core) as running:
        pid = max(running.serving, key=lambda pid: processes.cpu_seconds([pid]))
        duration = str(max(1, round(bench.seconds)))
        command = [py_spy, "record", "--pid", str(pid), "--duration", duration, "--output", str(into)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL):
            sample = bench.chats(running.target, AT_ONCE)
    print(f"{sample.per_second:,.0f} chats/s while py-spy watched: {into}")
    return 0


# --- what is said ----------------------------------------------------------------------------


def say(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def table(figures: Mapping[str, Figures]) -> Iterator[str]:
    yield f"{'':36}" + "".join(f"{name:>12}" for name in figures)
    for row in SHOWN:
        values = [each[row] for each in figures.values()]
        yield f"{row:36}" + "".join(f"{'–' if value is None else number(value):>12}" for value in values)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GATEWAYS), help="the gateways to run, with commas between them")
    parser.add_argument("--seconds", type=float, help="how long each run takes: 1.5, or 0.5 with --quick")
    parser.add_argument("--rounds", type=int, help="how often each gateway has its turn: 5, or 2 with --quick")
    parser.add_argument("--rounds-of-one", type=int, help="the same with one connection: 40, or 8 with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer starts, and fewer and shorter runs")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="instead, a flame graph of ours")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args()
    if unknown := [name for name in options.only.split(",") if name not in GATEWAYS]:
        parser.error(f"no gateway {', '.join(unknown)}: there are {', '.join(GATEWAYS)}")
    if not hasattr(os, "sched_setaffinity") or len(cores := sorted(os.sched_getaffinity(0))) < 2:
        print("not measured: it takes Linux and two cores", file=sys.stderr)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    load_before = os.getloadavg()[0]
    core, others = cores[0], cores[1]
    os.sched_setaffinity(0, {others})
    with tempfile.TemporaryDirectory() as folder, provider(others) as port:
        seconds = options.seconds or (0.5 if options.quick else 1.5)
        bench = Bench(Target(port, {}), Path(folder), core, seconds)
        if options.profile:
            return profile(bench, options.profile.resolve())
        wanted = [GATEWAYS[name] for name in options.only.split(",")]
        try:
            figures = compare(
                bench,
                wanted,
                rounds=options.rounds or (2 if options.quick else 5),
                rounds_of_one=options.rounds_of_one or (8 if options.quick else 40),
                quick=options.quick,
            )
        except Failed as error:
            print(f"not measured: {error}", file=sys.stderr)
            return 1
    say("")

    judged = judge(figures["ours"], figures) if "ours" in figures else []
    if options.json:
        told = {
            "load": load_before,
            "figures": {
                name: {row: each[row] for row in SHOWN if each[row] is not None}
                | ({"unavailable": each.unavailable} if each.unavailable else {})
                for name, each in figures.items()
            },
            "bounds": [asdict(each) for each in judged],
        }
        print(json.dumps(told, ensure_ascii=False, indent=2))
    else:
        if load_before > 0.5:
            print(f"other processes keep the cores busy (load {load_before:.1f}): all figures are worse for it\n")
        print(*table(figures), sep="\n")
        for name, each in figures.items():
            if each.unavailable:
                print(f"\n{name} not measured: {each.unavailable}")
        print()
        for one in judged:
            print(f"{one.promise:48} {one.verdict:12} {one.measured}")
    ours_did_not_run = "ours" in figures and bool(figures["ours"].unavailable)
    return int(ours_did_not_run or any(each.verdict == "MISSED" for each in judged))


@contextmanager
def provider(core: int) -> Iterator[int]:
    """The port of a stand-in provider that ends when we do."""
    with subprocess.Popen(
        [sys.executable, str(HERE / "upstream.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=processes.pinned(core),  # noqa: PLW1509 - there are no threads yet
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()
            process.terminate()


if __name__ == "__main__":
    sys.exit(main())
