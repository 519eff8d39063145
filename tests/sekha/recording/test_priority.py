from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

SAYS = """
import ctypes, os, resource, sys
from sekha.recording import priority

if sys.argv[1] == "may not" and hasattr(os, "SCHED_IDLE"):
    resource.setrlimit(resource.RLIMIT_NICE, (0, 0))
    if os.geteuid() == 0:  # what root may not in a container
        held = (ctypes.c_uint32 * 6)()
        head = (ctypes.c_uint32 * 2)(0x20080522, 0)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.capget(head, held) == 0
        held[0] &= ~(1 << 23)
        assert libc.capset(head, held) == 0
policies = {getattr(os, name): name for name in ("SCHED_OTHER", "SCHED_BATCH", "SCHED_IDLE") if hasattr(os, name)}

def policy():
    return policies[os.sched_getscheduler(0)] if policies else "as ever"

priority.begin()
said = [policy()]
for behind in (True, False):
    priority.give_way(behind=behind)
    said.append(policy())
print(os.nice(0), *said)
"""
CAP_SYS_NICE = 23


def said(may: str) -> str:
    done = subprocess.run([sys.executable, "-c", SAYS, may], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def may_come_back() -> bool:
    """As capabilities(7) and sched(7) have it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    held = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)
    return bool(held >> CAP_SYS_NICE & 1) or resource.getrlimit(resource.RLIMIT_NICE)[0] >= 10


def test_a_publisher_takes_what_nobody_wants_until_it_falls_behind() -> None:
    expected = "10 as ever as ever as ever"  # no other system than Linux has ways of waiting for a core
    if hasattr(os, "SCHED_IDLE"):
        expected = (
            "10 SCHED_IDLE SCHED_BATCH SCHED_IDLE" if may_come_back() else "10 SCHED_BATCH SCHED_BATCH SCHED_BATCH"
        )

    assert said("may") == expected


def test_who_could_not_come_back_never_waits_for_an_idle_processor() -> None:
    policy = "SCHED_BATCH" if hasattr(os, "SCHED_IDLE") else "as ever"

    assert said("may not") == f"10 {policy} {policy} {policy}"
