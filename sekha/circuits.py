"""The circuits of one process, and how it keeps them in step with other processes.

Each process counts the failures that it sees itself: whoever counts enough of them in a row opens the
circuit for all, and whoever's probes succeed closes it for all. Half open, the place of the one probe is
taken in the shared table, so that there is one among all processes; it is renewed while the probe is
under way and so is free again soon after its process died.

While the table cannot be reached every process goes on by itself, with a probe of its own; afterwards,
for each circuit, the later change holds.

Nothing here waits but `claim`, which only a call to a circuit that is not closed needs. Everything runs on
the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal, TypeAlias
from uuid import uuid4

from sekha.breaker import (
    CLOSED,
    BreakerRules,
    Circuit,
    State,
    admit,
    failed,
    given_back,
    later,
    opened_by,
    renewed,
    succeeded,
    wait_seconds,
)
from sekha.circuits_shared import SharedCircuits, Step
from sekha.errors import LedgerError, ProviderError
from sekha.naps import nap

__all__ = ["Circuits", "Tripped"]

log = logging.getLogger("sekha.circuits")

_EVERY_SECONDS = 0.4
"""How often the others' changes are read: twice in the second within which all are to agree."""
_CLAIM_SECONDS = 0.5
"""How long a call waits to become the probe. Then somebody else is asked."""
_PATIENCE_SECONDS = 2.0
"""How long the table may take to answer before this process goes on by itself."""

_PROBE_SECONDS = 1.0
"""After so many it is worth asking again whether a probe has ended: its lease is for one whose process died."""

Claimed: TypeAlias = Literal["ours", "theirs", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tripped:
    """A circuit changed its state."""

    name: str
    """`provider/model`."""
    before: State
    after: State
    at: float
    """Seconds since 1970."""
    reason: str
    """The code of the error that opened it; `probing` when it goes half open, `recovered` when it closes."""
    here: bool
    """Whether this process made the change. Of all that share it one did, or two that opened it at once."""


class Circuits:
    """The `Gate` of `call_in_turn`. A circuit that nobody has noted a failure for is closed."""

    def __init__(
        self,
        rules: BreakerRules,
        *,
        now: Callable[[], float] = time.time,
        shared: SharedCircuits | None = None,
    ) -> None:
        """`now` is a wall clock, since processes compare what it says. With `shared`, call `start`."""
        self.rules = rules
        self._now = now
        self._shared = shared
        self._circuits: dict[str, Circuit] = {}
        self._troubled: set[str] = set()
        """Those for which an answer is news."""
        self._shut: set[str] = set()
        """Those that are not closed."""
        self._open: frozenset[str] = frozenset()
        self._open_between = (0.0, 0.0)
        """While `_open` holds."""
        self.half_open: frozenset[str] = frozenset()
        """Those that are probed, or may be."""
        self._probes: dict[str, str] = {}
        """Probes of this process that are under way, and the circuit of each."""
        self._subscribers: list[Callable[[Tripped], None]] = []

        self._reachable = False
        self._warned = False
        self._seen = 0
        self._steps: list[tuple[str, Step]] = []
        self._claims: dict[str, tuple[str, asyncio.Future[Claimed]]] = {}
        self._untold: set[str] = set()
        """Those that changed while the table was away."""
        self._news = asyncio.Event()
        self._begun = asyncio.Event()
        self._closing = False
        self._following: asyncio.Task[None] | None = None

    # --- what calls ask and say ---

    def admit(self, name: str) -> bool:
        """Whether everybody may call, since the circuit is closed."""
        return name not in self._shut

    async def claim(self, name: str) -> str | None:
        """Become the one probe of a circuit that is not closed; None when nobody may call now.

        Whoever becomes it hands it to `note` or to `give_back`, however the call ends.
        """
        if self.admit(name) or self.wait_seconds(name) > 0 or name in self._claims:
            return None
        probe = uuid4().hex
        if not self._reachable:
            return self._claim_here(name, probe)
        claimed: asyncio.Future[Claimed] = asyncio.get_running_loop().create_future()
        self._claims[name] = (probe, claimed)
        self._tell(name, partial(_claimed, rules=self.rules, at=self._now(), probe=probe))
        try:
            async with asyncio.timeout(_CLAIM_SECONDS):
                whose = await claimed
        except TimeoutError:
            self.give_back(name, probe)
            return None
        except asyncio.CancelledError:
            self.give_back(name, probe)
            raise
        finally:
            del self._claims[name]
        match whose:
            case "ours":
                return probe
            case "theirs":
                return None
            case "unknown":
                return self._claim_here(name, probe)

    def note(self, name: str, error: ProviderError | None, *, probe: str | None = None, seconds: float = 0.0) -> None:
        """Count how a call ended that took so many seconds; its error says what it tells of the provider."""
        if error is None or error.health == "alive":
            if name in self._troubled:
                self._step(name, partial(succeeded, rules=self.rules, at=self._now(), probe=probe), probe)
        elif error.health == "failing":
            at = self._now()
            step = partial(failed, rules=self.rules, at=at, error=error.code, began_at=at - seconds, probe=probe)
            self._step(name, step, probe)
        elif probe is not None:
            self.give_back(name, probe)

    def give_back(self, name: str, probe: str) -> None:
        """Say that a probe ended and tells nothing about the provider."""
        self._step(name, partial(given_back, probe=probe), probe)

    def wait_seconds(self, name: str) -> float:
        """How long until the circuit lets a call through, as far as is known; a moment while it is being probed."""
        wait = self._wait_seconds(name, self._now())
        return min(wait, _PROBE_SECONDS) if name in self.half_open else wait

    # --- what others may know ---

    def soonest(self, names: Iterable[str]) -> float | None:
        """Seconds until the first of these that are not closed lets a probe through; None if all are closed."""
        return min((max(self.wait_seconds(name), 1.0) for name in names if name in self._shut), default=None)

    @property
    def open_now(self) -> frozenset[str]:
        """The circuits that let no call through, also no probe."""
        if self._shut:
            now = self._now()
            since, until = self._open_between
            # A clock that is set back must not keep what was true then.
            if not since <= now < until:
                waits = {name: self._wait_seconds(name, now) for name in self._shut}
                self._open = frozenset(name for name, wait in waits.items() if wait > 0)
                self._open_between = (now, now + min((wait for wait in waits.values() if wait > 0), default=math.inf))
        return self._open

    def snapshot(self) -> Mapping[str, Circuit]:
        """Every circuit that has had a failure, by `provider/model`; all others are closed."""
        return MappingProxyType(dict(self._circuits))

    def subscribe(self, callback: Callable[[Tripped], None]) -> Callable[[], None]:
        """Call back at every change of state, in the middle of a request: be quick. Returns what ends it."""
        self._subscribers.append(callback)
        return partial(self._subscribers.remove, callback)

    # --- sharing ---

    def look_like(self, circuits: Mapping[str, Circuit]) -> None:
        """Take over what others know, once: for whoever but looks, and shares nothing."""
        for name, circuit in circuits.items():
            self._put(name, circuit, here=False)

    async def start(self) -> None:
        """Learn what other processes know, and keep up with them from now on. Does not wait for a database for long."""
        if self._shared is None or self._following is not None:
            return
        self._following = asyncio.create_task(self._follow(self._shared), name="circuits")
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await self._begun.wait()

    async def aclose(self) -> None:
        """Tell the others what they have not heard yet, and stop following them. The database is still to be open."""
        following, self._following = self._following, None
        if following is None:
            return
        for probe, name in tuple(self._probes.items()):
            self.give_back(name, probe)
        self._closing = True
        self._news.set()
        done, _ = await asyncio.wait({following}, timeout=_PATIENCE_SECONDS)
        if not done:
            following.cancel()
        with suppress(asyncio.CancelledError):
            await following

    async def _follow(self, shared: SharedCircuits) -> None:
        try:
            await self._exchange(shared)
            self._begun.set()
            while not self._closing:
                await nap(self._news, _EVERY_SECONDS)
                self._renew_probes()
                await self._exchange(shared)
            if self._steps:
                await self._exchange(shared)
        finally:
            # Whatever ended this, nobody is left to claim a probe in the table.
            self._reachable = False

    async def _exchange(self, shared: SharedCircuits) -> None:
        """Tell the table what is new here, and learn from it what is new elsewhere, in one transaction."""
        steps, self._steps = self._steps, []
        untold, self._untold = self._untold, set()
        steps += [(name, partial(later, other=self._circuits.get(name, CLOSED))) for name in sorted(untold)]
        claims = {name: claim for name, claim in self._claims.items() if claim[0] not in self._probes}
        exchange = asyncio.wrap_future(shared.exchange(steps, self._seen))
        # One that takes long is let finish, since nobody could say otherwise what came of it.
        done, _ = await asyncio.wait({exchange}, timeout=_PATIENCE_SECONDS)
        if not done:
            self._by_itself("it takes too long to answer")
        try:
            changed, self._seen = await exchange
        except (LedgerError, RuntimeError) as error:  # a database that was closed raises RuntimeError
            self._untold |= untold | {name for name, _ in steps}
            self._by_itself(str(error))
            changed = {}
        else:
            if self._warned:
                log.info("circuits are shared between processes again")
            self._reachable, self._warned = True, False
        told = {name for name, _ in steps}
        for name, (probe, claimed) in claims.items():
            if claimed.done() or name not in told:
                continue
            if name not in changed:
                claimed.set_result("unknown")
                continue
            ours = changed[name].probe == probe
            if ours:
                self._probes[probe] = name
            claimed.set_result("ours" if ours else "theirs")
        newer = self._untold.union(name for name, _ in self._steps)
        for name, circuit in changed.items():
            # What happened here meanwhile goes there first, and comes back with the rest.
            if name not in newer:
                self._adopt(name, circuit)

    def _adopt(self, name: str, theirs: Circuit) -> None:
        if theirs.state == "closed" and self.admit(name):
            return
        self._put(name, theirs, here=theirs.probe in self._probes)

    def _by_itself(self, why: str) -> None:
        self._reachable = False
        if not self._warned:
            self._warned = True
            log.warning("circuits are not shared between processes for now: %s", why)

    def _renew_probes(self) -> None:
        now = self._now()
        for probe, name in self._probes.items():
            until = self._circuits[name].probe_until
            if until is not None and until - now < self.rules.lease_seconds / 2:
                self._tell(name, partial(renewed, rules=self.rules, at=now, probe=probe))

    def _tell(self, name: str, step: Step) -> None:
        if self._reachable:
            self._steps.append((name, step))
            self._news.set()
        elif self._shared is not None:
            self._untold.add(name)

    # --- one circuit ---

    def _step(self, name: str, step: Step, probe: str | None) -> None:
        """Take a step here at once, and have the others hear of it if it is more than a count."""
        if probe is not None:
            self._probes.pop(probe, None)
        before = self._circuits.get(name, CLOSED)
        after = step(before)
        if after != before:
            self._put(name, after, here=True)
        if probe is not None and before.state != "closed":
            self._tell(name, step)
        elif after.state != before.state:
            self._tell(name, partial(opened_by, other=after))

    def _claim_here(self, name: str, probe: str) -> str | None:
        circuit, admitted = admit(self._circuits[name], self.rules, self._now(), probe=probe)
        if not admitted or circuit.state == "closed":
            return None
        self._probes[probe] = name
        self._put(name, circuit, here=True)
        self._tell(name, partial(later, other=circuit))
        return probe

    def _wait_seconds(self, name: str, at: float) -> float:
        circuit = self._circuits.get(name, CLOSED)
        if circuit.probe in self._probes:
            # Under way right here, so nobody has to guess by its lease.
            return self.rules.lease_seconds
        return wait_seconds(circuit, self.rules, at)

    def _put(self, name: str, circuit: Circuit, *, here: bool) -> None:
        before = self._circuits.get(name, CLOSED)
        self._circuits[name] = circuit
        shut = circuit.state != "closed"
        (self._shut.add if shut else self._shut.discard)(name)
        (self._troubled.add if shut or circuit.failures else self._troubled.discard)(name)
        self._open_between = (0.0, 0.0)
        if "half_open" in (before.state, circuit.state):
            self.half_open = frozenset(each for each in self._shut if self._circuits[each].state == "half_open")
        if not self._shut:
            self._open = frozenset()
        if circuit.state != before.state:
            self._announce(_change(name, before, circuit, here=here))

    def _announce(self, change: Tripped) -> None:
        level = logging.WARNING if change.after == "open" else logging.INFO
        log.log(level, "circuit of %s: %s, was %s (%s)", change.name, change.after, change.before, change.reason)
        for callback in tuple(self._subscribers):
            try:
                callback(change)
            except Exception:  # whoever listens may not break the request that it listens to
                log.exception("a subscriber failed at a change of %s", change.name)


def _claimed(circuit: Circuit, *, rules: BreakerRules, at: float, probe: str) -> Circuit:
    return admit(circuit, rules, at, probe=probe)[0]


def _change(name: str, before: Circuit, after: Circuit, *, here: bool) -> Tripped:
    reasons: Mapping[State, str] = {"open": after.error or "", "half_open": "probing", "closed": "recovered"}
    return Tripped(
        name=name,
        before=before.state,
        after=after.state,
        at=after.since,
        reason=reasons[after.state],
        here=here,
    )
