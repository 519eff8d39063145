from __future__ import annotations

import subprocess
import sys

import pytest

SAYS = """
import os, resource, sys
from sekha.recording import priority

hard = resource.getrlimit(resource.RLIMIT_NICE)[1]
if sys.argv[1] == "may not":
    resource.setrlimit(resource.RLIMIT_NICE, (0, hard))
    if os.geteuid() == 0:
        os.seteuid(65534)
policies = {os.SCHED_OTHER: "other", os.SCHED_BATCH: "batch", os.SCHED_IDLE: "idle"}
priority.begin()
said = [policies[os.sched_getscheduler(0)]]
for behind in (True, False):
    priority.give_way(behind=behind)
    said.append(policies[os.sched_getscheduler(0)])
print(os.nice(0), *said)
"""


def said(may: str) -> str:
    # Before it is nobody it has to be able to read what it imports.
    done = subprocess.run([sys.executable, "-c", SAYS, may], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="no other system has these ways of waiting for a core")
def test_who_could_not_come_back_never_waits_for_an_idle_processor() -> None:
    assert said("may not") == "10 batch batch batch"


@pytest.mark.skipif(sys.platform != "linux", reason="no other system has these ways of waiting for a core")
def test_a_publisher_takes_what_nobody_wants_until_it_falls_behind() -> None:
    assert said("may") in ("10 idle batch idle", "10 batch batch batch")
